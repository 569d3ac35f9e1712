package backend

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Record is what is known of a running mount.
type Record struct {
	Reference string    `json:"reference"`
	Manifest  string    `json:"manifest"`
	Digest    string    `json:"digest"`
	Backend   string    `json:"backend"`
	Dir       string    `json:"dir"`
	PID       int       `json:"pid"`
	Since     time.Time `json:"since"`
	Log       string    `json:"log,omitempty"`
}

// State says how a recorded mount is.
type State string

const (
	Running State = "running"
	// Dead is a mount whose server ended without unmounting it.
	Dead State = "dead"
)

// Entry is a record and the state that its mount is in.
type Entry struct {
	Record
	State State `json:"state"`
}

// ErrInUse says that a directory already has a mount of ours.
var ErrInUse = errors.New("is already mounted by erofs-oci")

// Claim holds a directory for one server until Release.
type Claim struct {
	run  *RunDir
	id   string
	lock *os.File
}

func id(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return hex.EncodeToString(sum[:8])
}

func (r *RunDir) file(id, suffix string) string { return filepath.Join(r.path, id+suffix) }

// Claim takes dir (as RealDir returns it) for this process. A mount of ours
// that nobody holds any more is refused: it would stay below the new one for ever.
func (r *RunDir) Claim(dir string) (*Claim, error) {
	c, err := r.lock(id(dir))
	if errors.Is(err, ErrInUse) {
		return nil, fmt.Errorf("%s %w; see erofs-oci list", dir, err)
	}
	if err != nil {
		return nil, err
	}
	mounted, err := isMounted(dir)
	if err == nil && mounted {
		err = deadMount(dir)
	}
	if err != nil {
		// The record stays, for umount to find; only the lock goes.
		return nil, errors.Join(err, c.lock.Close())
	}
	return c, nil
}

func (r *RunDir) lock(id string) (*Claim, error) {
	for {
		f, err := os.OpenFile(r.file(id, ".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
			f.Close()
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
				return nil, ErrInUse
			}
			return nil, &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		// A server that ended between our open and our lock has taken the
		// file away: then the lock is on a file that nobody else can find.
		if sameFile(f) {
			return &Claim{run: r, id: id, lock: f}, nil
		}
		f.Close()
	}
}

func sameFile(f *os.File) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(f.Name())
	return err == nil && os.SameFile(held, named)
}

// LogPath is where the server of this claim may write its log.
func (c *Claim) LogPath() string { return c.run.file(c.id, ".log") }

// Write publishes the record.
func (c *Claim) Write(rec Record) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	next := c.run.file(c.id, ".json.new")
	if err := os.WriteFile(next, b, 0o600); err != nil {
		return err
	}
	return os.Rename(next, c.run.file(c.id, ".json"))
}

// Release takes the record away and lets go of the directory.
func (c *Claim) Release() error {
	err := c.run.remove(c.id)
	return errors.Join(err, c.lock.Close())
}

// remove deletes the files of one mount, the lock last: whoever finds a record
// without its lock finds a mount that has no server.
func (r *RunDir) remove(id string) error {
	var errs []error
	for _, suffix := range []string{".json.new", ".json", ".log.1", ".log", ".lock"} {
		if err := os.Remove(r.file(id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// alive asks whether a server holds the lock, without taking it.
func (r *RunDir) alive(id string) (bool, error) {
	f, err := os.OpenFile(r.file(id, ".lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return false, &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return lock.Type != unix.F_UNLCK, nil
}

// waitEnd returns when no server holds the lock any more.
func (r *RunDir) waitEnd(ctx context.Context, id string) error {
	f, err := os.OpenFile(r.file(id, ".lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		// Closing the file ends the lock; only this goroutine may close it,
		// since a closed descriptor's number could be another file's.
		defer f.Close()
		lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
		for {
			err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &lock)
			if !errors.Is(err, unix.EINTR) {
				done <- err
				return
			}
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read returns a record, and whether there is one.
func (r *RunDir) read(id string) (Record, bool, error) {
	var rec Record
	b, err := os.ReadFile(r.file(id, ".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, false, nil
	}
	if err != nil {
		return rec, false, err
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, false, fmt.Errorf("%s: %w; remove it", r.file(id, ".json"), err)
	}
	return rec, true, nil
}

// List returns the recorded mounts by directory. Records whose server has ended
// and whose mount is gone are swept away.
func (r *RunDir) List() ([]Entry, error) {
	names, err := filepath.Glob(r.file("*", ".json"))
	if err != nil {
		return nil, err
	}
	entries := []Entry{}
	for _, name := range names {
		e, ok, err := r.entry(strings.TrimSuffix(filepath.Base(name), ".json"))
		if err != nil {
			return nil, err
		}
		if ok {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Dir, b.Dir) })
	return entries, nil
}

func (r *RunDir) entry(id string) (Entry, bool, error) {
	rec, ok, err := r.read(id)
	if err != nil || !ok {
		return Entry{}, false, err
	}
	alive, err := r.alive(id)
	if err != nil {
		return Entry{}, false, err
	}
	if alive {
		return Entry{rec, Running}, true, nil
	}
	mounted, err := isMounted(rec.Dir)
	if err != nil {
		return Entry{}, false, err
	}
	if mounted {
		return Entry{rec, Dead}, true, nil
	}
	return Entry{}, false, r.sweep(id)
}

// sweep removes what a server left that could not clean up after itself. It
// takes the lock first, since a new server may just be starting.
func (r *RunDir) sweep(id string) error {
	c, err := r.lock(id)
	if errors.Is(err, ErrInUse) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.Release()
}
