package backend

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// machine is a machine as its files and devices show it.
type machine struct {
	release         string
	euid            int
	capEff, capBnd  uint64
	noNewPrivs      bool
	userNS          bool // in a user namespace of its own
	mountsElsewhere bool
	fileSystems     string
	modules         []string // installed
	config          string   // "" is not to be read
	devTmpfs        bool
	devices         []string
	forbidden       []string // devices that may not be opened
	fusermount      uint32   // its mode
	files           map[string]string
	noNetlink       bool
}

const allCapabilities = 1<<41 - 1

// desktop is a common machine, and root on it.
func desktop() machine {
	return machine{
		release: "6.12.41+deb13-amd64", capEff: allCapabilities, capBnd: allCapabilities, devTmpfs: true,
		fileSystems: "nodev\tproc\n\text4\nnodev\tfuse\n", modules: []string{"nbd", "erofs", "overlay", "loop"},
		devices: []string{"/dev/fuse", "/dev/loop-control"}, fusermount: unix.S_IFREG | 0o4755,
	}
}

// plainUser is a user of it.
func plainUser() machine {
	m := desktop()
	m.euid, m.capEff = 1000, 0
	return m
}

// dockerRoot is root in a container of docker's, with its defaults.
func dockerRoot() machine {
	m := desktop()
	m.capEff, m.capBnd, m.devTmpfs, m.modules, m.devices = 0xa80425fb, 0xa80425fb, false, nil, nil
	return m
}

func (m machine) probes() Probes {
	files := fstest.MapFS{}
	put := func(name, text string) { files[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o444} }
	put("proc/sys/kernel/osrelease", m.release+"\n")
	nnp := 0
	if m.noNewPrivs {
		nnp = 1
	}
	put("proc/self/status", fmt.Sprintf("Name:\tx\nUid:\t1\t%d\t1\t1\nCapEff:\t%016x\nCapBnd:\t%016x\nNoNewPrivs:\t%d\n", m.euid, m.capEff, m.capBnd, nnp))
	put("proc/filesystems", m.fileSystems)
	dev := "22 27 0:6 / / rw - ext4 /dev/vda rw\n"
	if m.devTmpfs {
		dev += "24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw\n"
	}
	put("proc/self/mountinfo", dev)
	ns := uint64(initialUserNS)
	if m.userNS {
		ns = 4026532000
	}
	files["proc/self/ns/user"] = &fstest.MapFile{Sys: &syscall.Stat_t{Ino: ns}}
	var dep strings.Builder
	for _, name := range m.modules {
		fmt.Fprintf(&dep, "kernel/some/where/%s.ko.xz: kernel/lib/x.ko.xz\n", name)
	}
	put("lib/modules/"+m.release+"/modules.dep", dep.String())
	if m.config != "" {
		put("boot/config-"+m.release, m.config)
	}
	if m.fusermount != 0 {
		files["bin/fusermount3"] = &fstest.MapFile{Sys: &syscall.Stat_t{Mode: m.fusermount}}
	}
	for name, text := range m.files {
		put(name, text)
	}
	p := Probes{Files: files, MountsOurs: func() (bool, error) { return !m.mountsElsewhere, nil }}
	p.Device = func(path string) error {
		if slices.Contains(m.forbidden, path) {
			return pathError("open", path, unix.EPERM)
		}
		if slices.Contains(m.devices, path) {
			return nil
		}
		return pathError("open", path, unix.ENOENT)
	}
	p.LookPath = func(name string) (string, error) {
		if name == "fusermount3" && m.fusermount != 0 {
			return "/bin/fusermount3", nil
		}
		return "", fs.ErrNotExist
	}
	p.NBDFamily = func() error {
		if m.noNetlink {
			return errors.New("no family")
		}
		return nil
	}
	return p
}

// with is a machine that differs.
func with(m machine, change func(*machine)) machine {
	m.files = maps.Clone(m.files)
	if m.files == nil {
		m.files = map[string]string{}
	}
	change(&m)
	return m
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		name    string
		machine machine
		want    string
		reason  string // or the error's
	}{
		{"root of a desktop", desktop(), NBD, "all that it needs is here"},
		{"a plain user", plainUser(), FUSE, "not nbd or file: not root (uid 1000)"},
		{"no nbd module", with(desktop(), func(m *machine) { m.modules = []string{"erofs"} }), FILE, "not nbd: the nbd module is neither loaded nor to be found for 6.12.41+deb13-amd64"},
		{"nbd is loaded", with(desktop(), func(m *machine) {
			m.modules, m.fileSystems = nil, "\terofs\n"
			m.files["sys/module/nbd/refcnt"] = "0"
		}), NBD, ""},
		{"nbd without netlink", with(desktop(), func(m *machine) { m.files["sys/module/nbd/refcnt"], m.noNetlink = "0", true }), NBD, ""},
		{"modules may not be loaded", with(desktop(), func(m *machine) { m.files["proc/sys/kernel/modules_disabled"] = "1\n" }), FUSE, "not nbd: the nbd module is neither"},
		{"no right to load nbd", with(desktop(), func(m *machine) { m.capEff &^= 1 << unix.CAP_SYS_MODULE }), FILE, "this process may not load it"},
		{"a /dev without nbd", with(desktop(), func(m *machine) { m.devTmpfs = false }), FILE, "not nbd: /dev has no nbd devices"},
		{"a /dev with nbd", with(desktop(), func(m *machine) { m.devTmpfs, m.files["dev/nbd0"] = false, "" }), NBD, ""},
		{"no erofs", with(desktop(), func(m *machine) { m.modules = []string{"nbd"} }), FUSE, "not nbd or file: the kernel's EROFS is neither there nor to be found for 6.12.41+deb13-amd64"},
		{"another module's name", with(desktop(), func(m *machine) { m.modules = []string{"nbd2", "xerofs", "erofs_x"} }), FUSE, "not nbd: the nbd module"},
		{"6.1 with loop devices", with(desktop(), func(m *machine) { m.release, m.modules = "6.1.0-9", []string{"erofs"} }), FILE, "not nbd: "},
		{"6.1 without", with(desktop(), func(m *machine) {
			m.release, m.modules, m.devices = "6.1.0-9", []string{"erofs"}, []string{"/dev/fuse"}
		}), FUSE, "not file: this kernel mounts no files"},
		{"built without files", with(desktop(), func(m *machine) {
			m.modules, m.devices, m.config = []string{"erofs"}, []string{"/dev/fuse"}, "CONFIG_EROFS_FS=m\n# CONFIG_EROFS_FS_BACKED_BY_FILE is not set\n"
		}), FUSE, "not file: this kernel mounts no files"},
		{"root of a user namespace", with(desktop(), func(m *machine) { m.userNS = true }), FUSE, "not nbd or file: in a user namespace"},
		{"no mount namespace with it", with(desktop(), func(m *machine) { m.userNS, m.mountsElsewhere, m.fusermount = true, true, 0 }), "", "no right to mount, and fusermount3 is not installed"},
		{"a container's root", dockerRoot(), "", "not nbd or file: this root has no CAP_SYS_ADMIN; not fuse: FUSE (open /dev/fuse: no such file or directory)"},
		{"a container's root with /dev/fuse", with(dockerRoot(), func(m *machine) { m.devices = []string{"/dev/fuse"} }), "", "CAP_SYS_ADMIN is not in the bounding set"},
		{"a container's root with CAP_SYS_ADMIN", with(dockerRoot(), func(m *machine) {
			m.devices, m.capEff = []string{"/dev/fuse"}, m.capEff|1<<unix.CAP_SYS_ADMIN
		}), FUSE, "not nbd: the nbd module"},
		{"a helper that is not setuid", with(plainUser(), func(m *machine) { m.fusermount = unix.S_IFREG | 0o755 }), "", "/bin/fusermount3 is not setuid root"},
		{"no new privileges", with(plainUser(), func(m *machine) { m.noNewPrivs = true }), "", "no_new_privs"},
		{"/dev/fuse for root only", with(plainUser(), func(m *machine) { m.forbidden = []string{"/dev/fuse"} }), FUSE, ""},
		{"/dev/fuse for nobody", with(desktop(), func(m *machine) { m.forbidden, m.modules, m.fusermount = []string{"/dev/fuse"}, nil, 0 }), "", "FUSE (open /dev/fuse: operation not permitted)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name, reason, err := Choose(c.machine.probes())
			if err != nil {
				reason = err.Error()
			}
			if name != c.want || (err == nil) != (c.want != "") || !strings.Contains(reason, c.reason) || strings.Contains(reason, "\n") {
				t.Errorf("%q, %q, %v; want %q, with %q", name, reason, err, c.want, c.reason)
			}
		})
	}
}

// TestChooseFails: what cannot be read is an error, and no guess.
func TestChooseFails(t *testing.T) {
	for _, file := range []string{"proc/sys/kernel/osrelease", "proc/self/status", "proc/filesystems", "proc/self/mountinfo"} {
		p := desktop().probes()
		delete(p.Files.(fstest.MapFS), file)
		if _, _, err := Choose(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("without %s: %v", file, err)
		}
	}
	if _, _, err := Choose(with(desktop(), func(m *machine) { m.release = "none" }).probes()); err == nil {
		t.Error("a kernel without a version")
	}
}

func TestDiagnose(t *testing.T) {
	full := "CONFIG_EROFS_FS_BACKED_BY_FILE=y\nCONFIG_EROFS_FS_ZIP=y\nCONFIG_EROFS_FS_ZIP_LZMA=y\nCONFIG_EROFS_FS_ZIP_DEFLATE=y\nCONFIG_EROFS_FS_ZIP_ZSTD=y\n"
	for _, c := range []struct {
		name    string
		machine machine
		status  Status
		about   string // begins What
		want    string // is in What or Do
	}{
		{"every compressor", with(desktop(), func(m *machine) { m.config = full }), OK, "the kernel's EROFS reads", "lz4, lzma, deflate, zstd"},
		{"by version", with(desktop(), func(m *machine) { m.release = "6.1.0" }), Warning, "the kernel's EROFS reads", "lz4, lzma, by its version; how it was built is not to be read, but not deflate, zstd"},
		{"lz4 only", with(desktop(), func(m *machine) { m.config = "CONFIG_EROFS_FS_ZIP=y\n" }), Warning, "the kernel's EROFS reads", "lz4, but not lzma, deflate, zstd"},
		{"none", with(desktop(), func(m *machine) { m.config = "CONFIG_EROFS_FS=y\n" }), Warning, "the kernel's EROFS reads", "nothing else, but not lz4"},
		{"old features", with(desktop(), func(m *machine) { m.files["sys/fs/erofs/features/dedupe"] = "" }), Warning, "the kernel's EROFS does not know", "fragments, 48bit, metabox"},
		{"user namespaces", plainUser(), OK, "user namespaces, where", ""},
		{"none of them", with(plainUser(), func(m *machine) { m.files["proc/sys/user/max_user_namespaces"] = "0\n" }), Warning, "user namespaces are forbidden", "sysctl user.max_user_namespaces"},
		{"not for users", with(plainUser(), func(m *machine) { m.files["proc/sys/kernel/unprivileged_userns_clone"] = "0\n" }), Warning, "user namespaces are forbidden to plain users", "sysctl kernel.unpriv"},
		{"AppArmor", with(plainUser(), func(m *machine) { m.files["proc/sys/kernel/apparmor_restrict_unprivileged_userns"] = "1\n" }), Warning, "AppArmor", "sysctl kernel.apparmor"},
		{"allow_other", with(plainUser(), func(m *machine) { m.files["etc/fuse.conf"] = "#user_allow_other\n user_allow_other\n" }), OK, "-o allow_other", ""},
		{"no allow_other", with(plainUser(), func(m *machine) { m.files["etc/fuse.conf"] = "#user_allow_other\n" }), Warning, "-o allow_other", "/etc/fuse.conf"},
		{"overlay", desktop(), OK, "overlayfs", ""},
		{"no overlay", with(desktop(), func(m *machine) { m.modules = nil }), Warning, "overlayfs", "modprobe overlay"},
		{"by ioctl", with(desktop(), func(m *machine) { m.files["sys/module/nbd/refcnt"], m.noNetlink = "0", true }), Warning, "the nbd driver", "network namespace"},
		{"netlink", with(desktop(), func(m *machine) { m.files["sys/module/nbd/refcnt"] = "0" }), OK, "the nbd driver", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Diagnose(c.machine.probes())
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(d.Findings, func(f Finding) bool { return strings.HasPrefix(f.What, c.about) })
			if i < 0 {
				t.Fatalf("nothing about %q in %+v", c.about, d.Findings)
			}
			f := d.Findings[i]
			if f.Status != c.status || !strings.Contains(f.What+f.Do, c.want) || (f.Status == OK) != (f.Do == "") {
				t.Errorf("%+v; want %s and %q", f, c.status, c.want)
			}
		})
	}
}

// TestDiagnoseAgrees: the diagnosis ends with the choice, and what its caller found
// counts.
func TestDiagnoseAgrees(t *testing.T) {
	for _, m := range []machine{desktop(), plainUser(), dockerRoot()} {
		d, err := Diagnose(m.probes())
		if err != nil {
			t.Fatal(err)
		}
		name, reason, err := Choose(m.probes())
		if err != nil {
			reason = err.Error()
		}
		if d.Auto != name || !strings.HasPrefix(reason, d.Reason) || d.Reason == "" || len(d.Verdicts) != 3 {
			t.Errorf("%+v; Choose says %q, %q", d, name, reason)
		}
	}
	d, err := Diagnose(desktop().probes(), Finding{For: byPreference(), Status: Missing, What: "no cache"})
	if err != nil || d.Auto != "" || !strings.Contains(d.Reason, "not nbd or file or fuse: no cache") {
		t.Errorf("%+v, %v", d, err)
	}
}

// TestConfig reads the configuration where kernels have it, zipped or not.
func TestConfig(t *testing.T) {
	const text = "# comment\nCONFIG_A=y\nCONFIG_B=\"x=y\"\n# CONFIG_C is not set\n"
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	fmt.Fprint(z, text)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		"proc/config.gz": zipped.String(), "boot/config-6.12": text, "lib/modules/6.12/config": text,
	} {
		h := &host{release: "6.12", Probes: Probes{Files: fstest.MapFS{name: {Data: []byte(data)}}}}
		got := h.readConfig()
		if want := map[string]string{"CONFIG_A": "y", "CONFIG_B": `"x=y"`}; !maps.Equal(got, want) {
			t.Errorf("%s: %q", name, got)
		}
	}
	// Damaged, then whole.
	h := &host{release: "6.12", Probes: Probes{Files: fstest.MapFS{
		"proc/config.gz": {Data: zipped.Bytes()[:20]}, "boot/config-6.12": {Data: []byte("CONFIG_D=m\n")},
	}}}
	if got := h.readConfig(); got["CONFIG_D"] != "m" || len(got) != 1 {
		t.Errorf("after a damaged one: %q", got)
	}
}

// TestThisMachine: the system's probes see what is so here.
func TestThisMachine(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	h, err := SystemProbes().host()
	if err != nil {
		t.Fatal(err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	if h.release != unix.ByteSliceToString(name.Release[:]) || !h.atLeast(4, 0) || h.atLeast(h.major, h.minor+1) || h.euid != 0 {
		t.Errorf("%+v", h)
	}
	if chosen, reason, err := Choose(SystemProbes()); err != nil {
		t.Errorf("%q, %q, %v", chosen, reason, err)
	}
	if err := OpenDevice("/dev/fuse"); err != nil {
		t.Error(err)
	}
	if err := SystemProbes().Device("/dev/nonexistent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a device that is not there: %v", err)
	}
}

func TestCheckCacheDir(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Join(dir, "not", "yet", "made")} {
		found := CheckCacheDir(d)
		if len(found) == 0 || found[0].Status != OK || !strings.Contains(found[0].What, dir+",") {
			t.Errorf("%s: %+v", d, found)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if found := CheckCacheDir(file); len(found) != 1 || found[0].Status != Missing || !strings.Contains(found[0].Do, "--cache-dir") {
		t.Errorf("a file: %+v", found)
	}
}

func TestCheckCacheDirInMemory(t *testing.T) {
	require.Has(t, "root")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	var said []string
	for _, f := range CheckCacheDir(dir) {
		said = append(said, string(f.Status)+" "+f.What)
	}
	got := strings.Join(said, "\n")
	if len(said) != 3 || !strings.Contains(got, "warning cache directory: it is in memory") || !strings.Contains(got, "little space is free") {
		t.Errorf("said:\n%s", got)
	}
}
