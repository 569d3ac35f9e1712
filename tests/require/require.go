// Package require says what a test needs of the machine it runs on.
//
// A test that needs more than Go names it:
//
//	require.Has(t, "root", "kernel-erofs")
//
// Where something is missing the test is skipped, with the reason. Where the
// environment variable EROFS_OCI_REQUIRE names the capability (a comma-separated
// list, or "all") the test fails instead: continuous integration names all of
// them, so nothing that it checks can be skipped in silence.
package require

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// probes maps each capability to a function that says why it is missing.
func probes() map[string]func() error {
	return map[string]func() error{
		"root":            root,
		"fuse":            fuse,
		"kernel-erofs":    fileSystem("erofs"),
		"overlay":         fileSystem("overlay"),
		"loop":            loop,
		"userns":          userns,
		"fusermount3":     program("fusermount3"),
		"mkfs.erofs":      program("mkfs.erofs"),
		"mkfs.ext4":       packaged("mkfs.ext4", "e2fsprogs"),
		"bzip2":           program("bzip2"),
		"docker-registry": program("docker-registry"),
		"nginx":           program("nginx"),
		"skopeo":          program("skopeo"),
		"setpriv":         program("setpriv"),
		"unshare":         program("unshare"),
		"nbdinfo":         program("nbdinfo"),
		"nbdcopy":         program("nbdcopy"),
		"nbdsh":           nbdsh,
		"nbdkit":          program("nbdkit"),
		"qemu-img":        program("qemu-img"),
		"qemu-io":         program("qemu-io"),
		"fio":             fioNBD,
		"veritysetup":     packaged("veritysetup", "cryptsetup-bin"),
		"nbd-guest":       nbdGuest,
		"debian":          debian,
		"umoci":           program("umoci"),
		"jq":              program("jq"),
		"xz":              packaged("xz", "xz-utils"),
		"zstd":            program("zstd"),
	}
}

// Has skips the test, or fails it where EROFS_OCI_REQUIRE says so, unless the
// machine has every one of the named capabilities.
func Has(t testing.TB, capabilities ...string) {
	t.Helper()
	known := probes()
	for _, c := range capabilities {
		probe, ok := known[c]
		if !ok {
			t.Fatalf("require: unknown capability %q; known are %s", c, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		err := probe()
		if err == nil {
			continue
		}
		if demanded(c) {
			t.Fatalf("require: %s is missing and EROFS_OCI_REQUIRE demands it: %v", c, err)
		}
		note(t, c)
		t.Skipf("needs %s: %v", c, err)
	}
}

// Long skips the test with -short, and says what takes its time. Continuous integration runs all tests once without
// -short, and again with it: with the race detector, and on one processor.
func Long(t testing.TB, what string) {
	t.Helper()
	if testing.Short() {
		t.Skipf("%s, which takes its time: -short is set", what)
	}
}

// note adds the capability to the file that EROFS_OCI_SKIPS names: go test does
// not show the skips of a package that passes, make test does.
func note(t testing.TB, capability string) {
	name := os.Getenv("EROFS_OCI_SKIPS")
	if name == "" {
		return
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatalf("require: EROFS_OCI_SKIPS: %v", err)
	}
	defer f.Close()
	if _, err := f.WriteString(capability + "\n"); err != nil {
		t.Fatalf("require: EROFS_OCI_SKIPS: %v", err)
	}
}

func demanded(capability string) bool {
	for name := range strings.SplitSeq(os.Getenv("EROFS_OCI_REQUIRE"), ",") {
		if name = strings.TrimSpace(name); name == "all" || name == capability {
			return true
		}
	}
	return false
}

func root() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the test runs as uid %d", os.Geteuid())
	}
	return nil
}

func fuse() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func fileSystem(name string) func() error {
	return func() error {
		known, err := os.ReadFile("/proc/filesystems")
		if err != nil {
			return err
		}
		if !slices.Contains(strings.Fields(string(known)), name) {
			return fmt.Errorf("the kernel has no %s", name)
		}
		return nil
	}
}

func loop() error {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// userns asks by trying: distributions forbid user namespaces in several ways.
func userns() error {
	cmd := exec.Command("true")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	return cmd.Run()
}

// nbdGuest is the one capability that must be asked for: booting kernels in an
// emulator takes minutes, and their packages come over the network.
func nbdGuest() error {
	if !demanded("nbd-guest") {
		return errors.New("kernels are booted only where EROFS_OCI_REQUIRE names nbd-guest (make guest)")
	}
	for _, name := range []string{"qemu-system-x86_64", "apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	return nil
}

// debian must be asked for, too: it is fetched over the network.
func debian() error {
	if !demanded("debian") {
		return errors.New("packages of Debian are fetched only where EROFS_OCI_REQUIRE names debian")
	}
	for _, name := range []string{"debootstrap", "apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	return root()
}

// SystemPath is the PATH with which nbdsh is run: it takes the first Python, and
// libnbd's module is the distribution's.
const SystemPath = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

func nbdsh() error {
	path, err := exec.LookPath("nbdsh")
	if err != nil {
		return err
	}
	cmd := exec.Command(path, "--version")
	cmd.Env = append(os.Environ(), SystemPath)
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, said)
	}
	return nil
}

// fioNBD asks fio for its engine: not every build has it.
func fioNBD() error {
	if said, err := exec.Command("fio", "--enghelp=nbd").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, said)
	}
	return nil
}

func program(name string) func() error {
	return func() error {
		_, err := exec.LookPath(name)
		return err
	}
}

// packaged is a program that Debian has in a package of another name.
func packaged(name, pkg string) func() error {
	return func() error {
		if err := program(name)(); err != nil {
			return fmt.Errorf("%w (it is in Debian's package %s)", err, pkg)
		}
		return nil
	}
}
