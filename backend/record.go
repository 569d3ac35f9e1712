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
	Device    Device    `json:"device,omitempty"` // empty until it is mounted
	PID       int       `json:"pid"`
	Since     time.Time `json:"since"`
	Log       string    `json:"log,omitempty"`

	// What another server needs to take the mount over.
	Size   int64           `json:"size,omitempty"`   // of the blob
	Layers []LayerState    `json:"layers,omitempty"` // in place of a blob: several, the lowest first; Digest is their chain id
	Access Access          `json:"access"`
	Files  []FileState     `json:"files,omitempty"` // in place of a blob: the image and its devices
	NBD    json.RawMessage `json:"nbd,omitempty"`   // the devices, as package nbdserve describes them; of several layers one of each, the topmost first

	Integrity []LayerIntegrity `json:"integrity,omitempty"`  // of each blob, the lowest first
	Wrong     string           `json:"wrong,omitempty"`      // what was found out about the bytes: they are not the manifest's
	LastWords string           `json:"last_words,omitempty"` // what the server could not do at its end

	Overlay      string `json:"overlay,omitempty"` // where what is written goes
	TmpfsOverlay bool   `json:"tmpfs_overlay,omitempty"`
}

// LayerState is the blob of one of several layers.
type LayerState struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// LayerIntegrity is what the manifest says that the blob of a layer is verified by.
type LayerIntegrity struct {
	MediaType   string            `json:"media_type,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Index       *IndexBlob        `json:"index,omitempty"` // a chunk index in a blob of its own
}

// IndexBlob is the blob of a chunk index.
type IndexBlob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// Access is how the blob of a mount is reached, but for what is secret.
type Access struct {
	LogFormat string `json:"log_format,omitempty"` // of the server's log; as usual if empty
	LogLevel  string `json:"log_level,omitempty"`

	CacheSize    string `json:"cache_size,omitempty"` // these three as they were given
	CacheMinFree string `json:"cache_min_free,omitempty"`
	Paranoid     bool   `json:"paranoid,omitempty"`

	PlainHTTP bool   `json:"plain_http,omitempty"`
	Username  string `json:"username,omitempty"` // the password is asked for again
	AuthFile  string `json:"authfile,omitempty"`
	OnError   string `json:"on_error,omitempty"`
	CacheDir  string `json:"cache_dir,omitempty"`
	TLSCA     string `json:"tls_ca,omitempty"`

	SkipTLSVerify   bool   `json:"skip_tls_verify,omitempty"`
	MaxConnsPerHost int    `json:"max_conns_per_host,omitempty"` // 0: as many as usual
	Verify          string `json:"verify,omitempty"`             // how bytes are verified; as usual if empty
	Offline         bool   `json:"offline,omitempty"`            // nothing is fetched
	Metrics         string `json:"metrics,omitempty"`            // where they are served

	Prefetch       string `json:"prefetch,omitempty"` // these three as they were given; a profile with its whole path
	PrefetchRate   string `json:"prefetch_rate,omitempty"`
	PrefetchBudget string `json:"prefetch_budget,omitempty"`

	Record string `json:"record,omitempty"` // the file of the profile that is recorded
}

// State says how a recorded mount is.
type State string

const (
	// Starting: the server has yet to mount.
	Starting State = "starting"
	Running  State = "running"
	// Detached: the server runs, but its mount is not to be seen: it was
	// detached in use, or is in another mount namespace.
	Detached State = "detached"
	// Dead: the server ended without unmounting, and nobody can take its place.
	Dead State = "dead"
	// Orphaned: the server ended without unmounting. Readers wait, and another
	// server can take its place.
	Orphaned State = "orphaned"
	// Ended: the mount is gone, and its server ended without having done all that it had to. The record says what that
	// was, until somebody was told.
	Ended State = "ended"
	// Stray: there is no record, but an nbd device that a server left which died
	// before it could write one.
	Stray State = "stray"
)

// Entry is a record and the state that its mount is in.
type Entry struct {
	Record
	State State `json:"state"`
}

// Remedy is the command of this program that mends the state, "" if none is needed.
func (e Entry) Remedy() string {
	switch e.State {
	case Dead, Ended:
		return "umount"
	case Orphaned:
		return "reattach"
	}
	return ""
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

// Claim takes dir (as RealDir returns it) for this process. A server that is just
// ending there is waited for. A mount that nobody serves any more is refused: it
// would stay below the new one for ever.
func (r *RunDir) Claim(ctx context.Context, dir string) (*Claim, error) {
	c, err := r.lock(id(dir))
	if errors.Is(err, ErrInUse) {
		if c, err = r.lockAfter(ctx, dir); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	if err := r.checkFree(c.id, dir); err != nil {
		// The record stays, for umount to find; only the lock goes.
		return nil, errors.Join(err, c.lock.Close())
	}
	// What is left of a server whose mount is gone is not this one's.
	for _, suffix := range append(logSuffixes(), ".sock", ".json") {
		if err := os.Remove(r.file(c.id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, errors.Join(err, c.Release())
		}
	}
	return c, nil
}

// lockAfter waits for the holder of the lock if that is about to let go of it:
// its mount is gone.
func (r *RunDir) lockAfter(ctx context.Context, dir string) (*Claim, error) {
	inUse := fmt.Errorf("%s %w; see erofs-oci list", dir, ErrInUse)
	rec, recorded, err := r.read(id(dir))
	if err != nil {
		return nil, err
	}
	on, err := mountsOn(dir)
	if err != nil {
		return nil, err
	}
	if recorded && on.has(rec.Device) {
		return nil, inUse
	}
	wait, cancel := context.WithTimeout(ctx, endPatience)
	defer cancel()
	if err := r.waitEnd(wait, id(dir)); err != nil {
		return nil, fmt.Errorf("%s: another erofs-oci mount is starting or ending there; see erofs-oci list", dir)
	}
	c, err := r.lock(id(dir))
	if errors.Is(err, ErrInUse) {
		return nil, inUse
	}
	return c, err
}

// checkFree refuses a directory that has a mount of ours, served or not.
func (r *RunDir) checkFree(id, dir string) error {
	rec, recorded, err := r.read(id)
	if err != nil {
		return err
	}
	on, err := mountsOn(dir)
	if err != nil {
		return err
	}
	switch {
	case recorded && on.has(rec.Device), on.fuse() && serverless(dir):
		return fmt.Errorf("mount target %s is a mount whose server is gone; erofs-oci umount it first", dir)
	case on.fuse():
		return fmt.Errorf("%s %w, of another user or with another run directory", dir, ErrInUse)
	}
	return nil
}

func (r *RunDir) lock(id string) (*Claim, error) {
	for {
		f, err := os.OpenFile(r.file(id, ".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := tryLock(f); err != nil {
			f.Close()
			if heldByOther(err) {
				return nil, ErrInUse
			}
			return nil, err
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

// Amend changes the record that was published.
func (c *Claim) Amend(change func(*Record)) error {
	rec, ok, err := c.run.read(c.id)
	if err != nil || !ok {
		return err
	}
	change(&rec)
	return c.Write(rec)
}

// Abandon lets go of the directory and leaves the record to the next who comes.
func (c *Claim) Abandon() error { return c.lock.Close() }

// SupervisorLog is where who supervises the server of dir may write.
func (r *RunDir) SupervisorLog(dir string) string { return r.file(id(dir), ".supervisor.log") }

// Release lets go of the directory and takes the record away, unless the mount is
// still there: it is dead then, and list says so until it is unmounted.
func (c *Claim) Release() error {
	rec, recorded, err := c.run.read(c.id)
	if err != nil || !recorded {
		return errors.Join(err, c.run.remove(c.id), c.lock.Close())
	}
	on, err := mountsOn(rec.Dir)
	if err != nil || !on.has(rec.Device) {
		return errors.Join(err, c.run.remove(c.id), c.lock.Close())
	}
	rec.NBD = nil // nobody can take the place of a server that has ended in order
	return errors.Join(c.Write(rec), c.lock.Close())
}

// End is Release for a server that leaves something undone: what that is stays recorded, and the log with it, until
// Unmount has said it, or the directory is mounted on again.
func (c *Claim) End(lastWords string) error {
	rec, recorded, err := c.run.read(c.id)
	if err != nil || !recorded || lastWords == "" {
		return c.Release()
	}
	if on, err := mountsOn(rec.Dir); err != nil || on.has(rec.Device) {
		return c.Release()
	}
	rec.NBD, rec.LastWords = nil, lastWords
	return errors.Join(c.Write(rec), c.lock.Close())
}

func logSuffixes() []string {
	return []string{".log.1", ".log", ".supervisor.log.1", ".supervisor.log"}
}

// remove deletes the files of one mount, the lock last: whoever finds a record
// without its lock finds a mount that has no server.
func (r *RunDir) remove(id string) error {
	var errs []error
	for _, suffix := range append(logSuffixes(), ".sock", ".json.new", ".json", ".lock") {
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
		// since a closed descriptor's number could be another file's. It does so
		// before it answers: who waited may want the lock.
		lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
		for {
			err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &lock)
			if !errors.Is(err, unix.EINTR) {
				done <- errors.Join(err, f.Close())
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

// List returns the recorded mounts by directory, and what could not be read.
// Records whose server has ended and whose mount is gone are swept away, unless that server left last words.
func (r *RunDir) List() ([]Entry, error) {
	names, err := filepath.Glob(r.file("*", ".json"))
	if err != nil {
		return nil, err
	}
	entries := []Entry{}
	var errs []error
	for _, name := range names {
		e, ok, err := r.entry(strings.TrimSuffix(filepath.Base(name), ".json"))
		if err != nil {
			errs = append(errs, err)
		} else if ok {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Dir, b.Dir) })
	return entries, errors.Join(errs...)
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
	on, err := mountsOn(rec.Dir)
	if err != nil {
		return Entry{}, false, err
	}
	mounted := on.has(rec.Device) || rec.Device == "" && on.fuse() && serverless(rec.Dir)
	switch {
	case alive && rec.Device == "":
		return Entry{rec, Starting}, true, nil
	case alive && mounted:
		return Entry{rec, Running}, true, nil
	case alive:
		return Entry{rec, Detached}, true, nil
	case mounted && rec.NBD != nil:
		return Entry{rec, Orphaned}, true, nil
	case mounted:
		return Entry{rec, Dead}, true, nil
	case rec.LastWords != "" && exists(rec.Dir): // else it has no name to ask by
		return Entry{rec, Ended}, true, nil
	}
	return Entry{}, false, r.sweep(id)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Find returns the entry of dir, and whether there is one.
func (r *RunDir) Find(dir string) (Entry, bool, error) { return r.entry(id(dir)) }

// CheckUpper refuses to have an overlay keep in dir what is written to it where that
// of another mount is kept whose server is gone. Its lock went with the server, but
// the kernel still writes there.
func (r *RunDir) CheckUpper(dir string) error {
	if dir == "" {
		return nil
	}
	ours, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	entries, err := r.List()
	for _, e := range entries {
		if e.Overlay == "" || e.State != Orphaned && e.State != Dead {
			continue
		}
		if theirs, err := os.Stat(e.Overlay); err == nil && os.SameFile(ours, theirs) {
			return fmt.Errorf("overlay: the mount on %s, which is %s, keeps in %s what is written to it: erofs-oci %s %s first, or choose another directory",
				e.Dir, e.State, dir, e.Remedy(), e.Dir)
		}
	}
	return err
}

// Adopt takes an orphaned mount for this process.
func (r *RunDir) Adopt(dir string) (*Claim, Record, error) {
	e, ok, err := r.Find(dir)
	if err != nil {
		return nil, Record{}, err
	}
	if !ok {
		return nil, Record{}, fmt.Errorf("%s is not mounted by erofs-oci; erofs-oci list shows what is", dir)
	}
	if e.State != Orphaned {
		return nil, Record{}, fmt.Errorf("%s is %s, not orphaned: there is nothing to reattach", dir, e.State)
	}
	c, err := r.lock(id(dir))
	if errors.Is(err, ErrInUse) {
		return nil, Record{}, fmt.Errorf("%s is being reattached by another process", dir)
	}
	return c, e.Record, err
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
