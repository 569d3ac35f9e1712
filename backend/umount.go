package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// Detach takes the mount of device d away from dir, and nothing else that may
// have been mounted there since: with lazy at once, the file system itself ending
// with its last user. A mount that is gone already is no error.
func Detach(dir string, d Device, lazy bool) error {
	on, err := mountsOn(dir)
	if err != nil || !on.has(d) {
		return err
	}
	if on.top() != d {
		return fmt.Errorf("unmount %s: something else is mounted over it; unmount that first", dir)
	}
	return detachTop(dir, lazy)
}

// detachTop unmounts what is on dir. Where the right to do so is missing,
// fusermount3 does it for the owner of a FUSE mount.
func detachTop(dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	if !errors.Is(err, unix.EPERM) {
		return wrapUmount(dir, err)
	}
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	cmd, lookErr := Fusermount(append(args, "--", dir)...)
	if lookErr != nil {
		return wrapUmount(dir, err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		if bytes.Contains(said.Bytes(), []byte("busy")) {
			return wrapUmount(dir, unix.EBUSY)
		}
		return fmt.Errorf("unmount %s: %w: %s", dir, err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}

func wrapUmount(dir string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmount %s: %w: a process has a file or its working directory there (fuser -vm %s shows it); end it, or umount --lazy", dir, err, dir)
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}

// Fusermount is a call of the helper that mounts FUSE file systems for plain
// users. It gets no environment of ours, which may hold a password.
func Fusermount(args ...string) (*exec.Cmd, error) {
	for _, name := range []string{"fusermount3", "/bin/fusermount3", "fusermount", "/bin/fusermount"} {
		if path, err := exec.LookPath(name); err == nil {
			cmd := exec.Command(path, args...)
			cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
			return cmd, nil
		}
	}
	return nil, errors.New("fusermount3 is not installed")
}

// endPatience is how long a server may take to end whose mount is gone already.
const endPatience = 2 * time.Second

// Unmount ends the mount on dir and, unless it is detached lazily, waits until
// its server has ended, too, for at most patience. Dead mounts are cleared. What the
// server could not do at its end is the error then.
func (r *RunDir) Unmount(ctx context.Context, dir string, lazy bool, patience time.Duration) error {
	real, err := RealDir(dir)
	if err != nil {
		return err
	}
	id := id(real)
	rec, recorded, err := r.read(id)
	if err != nil {
		return err
	}
	alive, err := r.alive(id)
	if err != nil {
		return err
	}
	on, err := mountsOn(real)
	if err != nil {
		return err
	}
	known := recorded && rec.Device != ""
	ours := known && on.top() == rec.Device || !known && on.fuse()
	switch {
	case ours:
		// Nobody can close a file of a dead FUSE server: waiting is of no use.
		if err := Detach(real, on.top(), lazy || !alive && serverless(real)); err != nil {
			return err
		}
	case recorded && on.has(rec.Device):
		return fmt.Errorf("unmount %s: something else is mounted over it; unmount that first", dir)
	case !recorded:
		return fmt.Errorf("%s is not mounted by erofs-oci; erofs-oci list shows what is", dir)
	default:
		patience = min(patience, endPatience)
	}
	if lazy && alive {
		return nil
	}
	return r.awaitServer(ctx, id, rec, ours, patience)
}

// lastWords is an error of what the server that has ended could not do. What is wrong with the record sweep says.
func (r *RunDir) lastWords(id string) error {
	rec, recorded, err := r.read(id)
	if err != nil || !recorded || rec.LastWords == "" {
		return nil
	}
	return fmt.Errorf("%s is unmounted, but its server could not do all that it had to: %s", rec.Dir, rec.LastWords)
}

// awaitServer waits for the server of a mount that is gone, and clears what a
// dead one left.
func (r *RunDir) awaitServer(ctx context.Context, id string, rec Record, unmounted bool, patience time.Duration) error {
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := r.waitEnd(wait, id)
	switch {
	case err == nil:
		return errors.Join(r.lastWords(id), r.sweep(id))
	case !errors.Is(err, context.DeadlineExceeded):
		return err
	case unmounted:
		return fmt.Errorf("%s is unmounted, but its server (pid %d) still runs: the file system is in use under another name or in another mount namespace", rec.Dir, rec.PID)
	}
	return fmt.Errorf("%s is served by pid %d but not mounted here: it is detached and in use, or mounted in another mount namespace", rec.Dir, rec.PID)
}
