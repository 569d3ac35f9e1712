package backend

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Probes are how Choose and Diagnose look at the machine. They change nothing.
type Probes struct {
	// Files is the root directory.
	Files fs.FS
	// Device says why a device cannot be read and written.
	Device func(path string) error
	// NBDFamily says why the nbd driver cannot be spoken to by netlink. Nil is
	// not asked.
	NBDFamily func() error
	// MountsOurs tells whether this process's mounts belong to its user
	// namespace, not to one above.
	MountsOurs func() (bool, error)
	// LookPath finds a program.
	LookPath func(name string) (string, error)
}

// SystemProbes look at this machine. Devices are not opened.
func SystemProbes() Probes {
	return Probes{
		Files:      os.DirFS("/"),
		Device:     func(path string) error { return pathError("access", path, unix.Access(path, unix.R_OK|unix.W_OK)) },
		MountsOurs: mountsOurs,
		LookPath:   exec.LookPath,
	}
}

// OpenDevice is a Probes.Device that is surer than that of SystemProbes: it opens
// the device, which a container may forbid whatever the mode says.
func OpenDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// mountsOurs asks the kernel whose the mount namespace is.
func mountsOurs() (bool, error) {
	f, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return false, err
	}
	defer f.Close()
	owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if errors.Is(err, unix.EPERM) {
		return false, nil // it lies outside of ours
	}
	if err != nil {
		return false, pathError("NS_GET_USERNS", f.Name(), err)
	}
	defer unix.Close(owner)
	var theirs, ours unix.Stat_t
	if err := errors.Join(unix.Fstat(owner, &theirs), unix.Stat("/proc/self/ns/user", &ours)); err != nil {
		return false, err
	}
	return theirs.Ino == ours.Ino, nil
}

// initialUserNS is the inode number of the first user namespace
// (linux/nsfs.h USER_NS_INIT_INO).
const initialUserNS = 0xEFFFFFFD

// InitialUserNamespace tells whether this process is in the first user namespace,
// where root is root.
func InitialUserNamespace(files fs.FS) (bool, error) {
	st, err := stat(files, "proc/self/ns/user")
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // a kernel without user namespaces
	}
	if err != nil {
		return false, err
	}
	return st.Ino == initialUserNS, nil
}

func stat(files fs.FS, name string) (*syscall.Stat_t, error) {
	info, err := fs.Stat(files, name)
	if err != nil {
		return nil, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, fmt.Errorf("%s: its stat is not to be had", name)
	}
	return st, nil
}

// host is what of a machine the backends depend on.
type host struct {
	Probes
	release      string // of the kernel, as "6.12.41+deb13-amd64"
	major, minor int    // its version
	euid         int
	effective    uint64 // capabilities
	bounding     uint64
	noNewPrivs   bool
	initial      bool // in the first user namespace
	mountsOurs   bool
	fileSystems  []string
	deviceTree   bool // /dev is the kernel's own: nodes of new devices appear
	// config are the options that the kernel was built with, nil where they are
	// not to be read.
	config func() map[string]string
}

func (p Probes) host() (*host, error) {
	h := &host{Probes: p}
	h.config = sync.OnceValue(h.readConfig)
	var err error
	if h.release, err = p.line("proc/sys/kernel/osrelease"); err != nil {
		return nil, err
	}
	if _, err := fmt.Sscanf(h.release, "%d.%d", &h.major, &h.minor); err != nil {
		return nil, fmt.Errorf("kernel release %q: %w", h.release, err)
	}
	if err := h.readStatus(); err != nil {
		return nil, err
	}
	if h.initial, err = InitialUserNamespace(p.Files); err != nil {
		return nil, err
	}
	h.mountsOurs = true
	if !h.initial {
		if h.mountsOurs, err = p.MountsOurs(); err != nil {
			return nil, err
		}
	}
	known, err := fs.ReadFile(p.Files, "proc/filesystems")
	if err != nil {
		return nil, err
	}
	h.fileSystems = strings.Fields(string(known))
	return h, h.readMounts()
}

// readStatus reads proc_pid_status(5).
func (h *host) readStatus() error {
	b, err := fs.ReadFile(h.Files, "proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		words := strings.Fields(value)
		var err error
		switch {
		case key == "Uid" && len(words) == 4:
			h.euid, err = strconv.Atoi(words[1])
		case key == "CapEff" && len(words) == 1:
			h.effective, err = strconv.ParseUint(words[0], 16, 64)
		case key == "CapBnd" && len(words) == 1:
			h.bounding, err = strconv.ParseUint(words[0], 16, 64)
		case key == "NoNewPrivs":
			h.noNewPrivs = strings.TrimSpace(value) == "1"
		}
		if err != nil {
			return fmt.Errorf("/proc/self/status: %s: %w", key, err)
		}
	}
	return nil
}

func (h *host) readMounts() error {
	f, err := h.Files.Open("proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	on, err := mountinfo.GetMountsFromReader(f, mountinfo.SingleEntryFilter("/dev"))
	if err != nil {
		return fmt.Errorf("/proc/self/mountinfo: %w", err)
	}
	h.deviceTree = len(on) > 0 && on[0].FSType == "devtmpfs"
	return nil
}

func (h *host) can(capability int) bool { return h.effective>>capability&1 == 1 }

// root tells whether this process may mount what only root may.
func (h *host) root() bool { return h.initial && h.can(unix.CAP_SYS_ADMIN) }

// atLeast compares the kernel's version.
func (h *host) atLeast(major, minor int) bool {
	return h.major > major || h.major == major && h.minor >= minor
}

func (h *host) has(fileSystem string) bool { return slices.Contains(h.fileSystems, fileSystem) }

func (p Probes) exists(name string) bool {
	_, err := fs.Stat(p.Files, name)
	return err == nil
}

// line is the first line of a file.
func (p Probes) line(name string) (string, error) {
	b, err := fs.ReadFile(p.Files, name)
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(first), nil
}

// forbidden tells whether a sysctl is there and zero.
func (p Probes) forbidden(name string) bool {
	v, err := p.line(path.Join("proc/sys", name))
	return err == nil && v == "0"
}

// loadable tells whether a kernel module is installed and may be loaded.
func (h *host) loadable(module string) bool {
	if v, err := h.line("proc/sys/kernel/modules_disabled"); err == nil && v == "1" {
		return false
	}
	dep, err := fs.ReadFile(h.Files, path.Join("lib/modules", h.release, "modules.dep"))
	if err != nil {
		return false
	}
	// A line is "kernel/drivers/block/nbd.ko.xz: what it needs".
	for line := range bytes.Lines(dep) {
		file, _, _ := bytes.Cut(line, []byte(":"))
		if name, _, _ := strings.Cut(path.Base(string(file)), ".ko"); name == module {
			return true
		}
	}
	return false
}

// maxConfig bounds what is read of a kernel's configuration.
const maxConfig = 4 << 20

// readConfig reads the options that the kernel was built with; nil where they are
// not to be read.
func (h *host) readConfig() map[string]string {
	for _, name := range []string{"proc/config.gz", "boot/config-" + h.release, path.Join("lib/modules", h.release, "config")} {
		f, err := h.Files.Open(name)
		if err != nil {
			continue
		}
		options, err := parseConfig(f, path.Ext(name) == ".gz")
		if f.Close() == nil && err == nil && len(options) > 0 {
			return options
		}
	}
	return nil
}

func parseConfig(r io.Reader, zipped bool) (map[string]string, error) {
	if zipped {
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, err
		}
		r = z
	}
	options := make(map[string]string)
	s := bufio.NewScanner(io.LimitReader(r, maxConfig))
	for s.Scan() {
		if key, value, ok := strings.Cut(s.Text(), "="); ok {
			options[key] = value
		}
	}
	return options, s.Err()
}
