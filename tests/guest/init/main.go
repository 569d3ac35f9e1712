// Command init is PID 1 of a guest of package guest. It mounts what a program
// expects, loads the modules, runs the job, and powers the machine off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/guest"
)

func main() {
	exit, err := run()
	said := fmt.Sprintf("exit %d\n", exit)
	if err != nil {
		said = fmt.Sprintf("init: %v\n", err)
	}
	if err := report(said); err != nil {
		// On the console, whose end the host prints where there is no status.
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	unix.Sync()
	err = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Fprintln(os.Stderr, "init: power off:", err)
}

func run() (exit int, err error) {
	if err := mounts(); err != nil {
		return 0, err
	}
	var todo guest.Instructions
	text, err := os.ReadFile(guest.InstructionsFile)
	if err != nil {
		return 0, err
	}
	if err := json.Unmarshal(text, &todo); err != nil {
		return 0, err
	}
	for _, m := range todo.Modules {
		if err := load(m); err != nil {
			return 0, err
		}
	}
	if err := errors.Join(loopback(), nameDisks()); err != nil {
		return 0, err
	}
	out, err := serial("/dev/ttyS1")
	if err != nil {
		return 0, err
	}
	defer out.Close()
	exit, err = job(todo, out)
	return exit, errors.Join(err, drain(out))
}

// mounts makes the file systems that every Linux has.
func mounts() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return os.Chmod("/tmp", 0o1777)
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

// loopback brings the interface lo up.
func loopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// nameDisks makes /disks/NAME of each disk by its serial number: which of them
// is vda depends on the machine.
func nameDisks() error {
	serials, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return err
	}
	if err := os.Mkdir("/disks", 0o755); err != nil {
		return err
	}
	for _, s := range serials {
		name, err := os.ReadFile(s)
		if err != nil {
			return err
		}
		dev := filepath.Base(filepath.Dir(s))
		if err := os.Symlink("/dev/"+dev, filepath.Join("/disks", strings.TrimSpace(string(name)))); err != nil {
			return err
		}
	}
	return nil
}

// job runs the program and reaps whatever else ends meanwhile: the children of
// the dead come to PID 1.
func job(todo guest.Instructions, out *os.File) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(todo.Argv[0], todo.Argv, &syscall.ProcAttr{
		Dir: "/tmp", Env: todo.Env, Files: []uintptr{null.Fd(), out.Fd(), out.Fd()},
	})
	if err != nil {
		return 0, fmt.Errorf("run %s: %w", todo.Argv[0], err)
	}
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, err
		case got == pid && status.Exited():
			return status.ExitStatus(), nil
		case got == pid:
			return 128 + int(status.Signal()), nil
		}
	}
}

// report tells the host how it ended.
func report(said string) error {
	f, err := serial("/dev/ttyS2")
	if err != nil {
		return err
	}
	_, err = f.WriteString(said)
	return errors.Join(err, drain(f), f.Close())
}

// serial opens a serial port that passes bytes on as they are.
func serial(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// drain waits until everything has left the port: tcdrain(3). An orphan that
// dies meanwhile sends SIGCHLD, which ends the wait early.
func drain(f *os.File) error {
	for {
		err := unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
