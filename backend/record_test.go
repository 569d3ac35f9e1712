package backend

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func testRunDir(t *testing.T) *RunDir {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "run")
	if err := PrivateDir(dir); err != nil {
		t.Fatal(err)
	}
	return &RunDir{dir}
}

func claim(t *testing.T, r *RunDir, rec Record) *Claim {
	t.Helper()
	c, err := r.Claim(context.Background(), rec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Write(rec); err != nil {
		t.Fatal(err)
	}
	return c
}

func list(t *testing.T, r *RunDir) []Entry {
	t.Helper()
	entries, err := r.List()
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func TestRecordLife(t *testing.T) {
	r := testRunDir(t)
	rec := Record{Reference: "localhost/x:v1", Dir: "/nowhere/a", PID: 7, Since: time.Now().UTC(), Backend: "fuse"}
	if got := list(t, r); got == nil || len(got) != 0 {
		t.Fatalf("an empty directory lists %v; want an empty list, which is [] in JSON", got)
	}
	c := claim(t, r, rec)
	got := list(t, r)
	if len(got) != 1 || !reflect.DeepEqual(got[0].Record, rec) || got[0].State != Starting {
		t.Fatalf("listed %+v", got)
	}
	// Not mounted yet, or not any more: whoever comes next waits a little.
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.Claim(short, rec.Dir); err == nil || !strings.Contains(err.Error(), "starting or ending") {
		t.Fatalf("second claim: %v", err)
	}
	rec.Device = "0:9999"
	if err := c.Write(rec); err != nil {
		t.Fatal(err)
	}
	if got := list(t, r); len(got) != 1 || got[0].State != Detached {
		t.Fatalf("listed %+v", got)
	}
	// Asking must not have disturbed the lock.
	if alive, err := r.alive(c.id); err != nil || !alive {
		t.Fatalf("alive %v, %v", alive, err)
	}
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(r.path); err != nil || len(left) != 0 {
		t.Fatalf("left behind: %v, %v", left, err)
	}
	again, err := r.Claim(t.Context(), rec.Dir)
	if err != nil {
		t.Fatalf("claim after release: %v", err)
	}
	again.Release()
}

// TestClaimAfterTheEnding: a server that is about to end is waited for.
func TestClaimAfterTheEnding(t *testing.T) {
	r := testRunDir(t)
	old := claim(t, r, Record{Dir: "/nowhere/c", Device: "0:9999"})
	claimed := make(chan error, 1)
	go func() {
		c, err := r.Claim(t.Context(), "/nowhere/c")
		if err == nil {
			err = c.Release()
		}
		claimed <- err
	}()
	if err := old.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-claimed; err != nil {
		t.Fatal(err)
	}
}

// TestRecordOfTheDead ends a server as SIGKILL does: the lock goes, the files stay.
func TestRecordOfTheDead(t *testing.T) {
	r := testRunDir(t)
	c := claim(t, r, Record{Dir: t.TempDir()})
	if err := os.WriteFile(c.LogPath(), []byte("last words\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.lock.Close()
	if got := list(t, r); len(got) != 0 {
		t.Fatalf("a mount that is gone is listed: %+v", got)
	}
	if left, err := os.ReadDir(r.path); err != nil || len(left) != 0 {
		t.Fatalf("not swept: %v, %v", left, err)
	}
}

// mountedRecord is of a directory that has a mount, which stays.
func mountedRecord(t *testing.T) Record {
	t.Helper()
	on, err := mountsOn("/")
	if err != nil {
		t.Fatal(err)
	}
	return Record{Dir: "/", Device: on.top(), NBD: json.RawMessage("[]")}
}

// TestReleaseOfTheMounted: where a server ends and its mount stays, the record and
// the log stay, too. Nobody can take over what it served.
func TestReleaseOfTheMounted(t *testing.T) {
	r := testRunDir(t)
	rec := mountedRecord(t)
	c := claim(t, r, rec)
	if err := os.WriteFile(c.LogPath(), []byte("why\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	if got := list(t, r); len(got) != 1 || got[0].State != Dead || got[0].NBD != nil {
		t.Fatalf("listed %+v", got)
	}
	if said, err := os.ReadFile(c.LogPath()); err != nil || string(said) != "why\n" {
		t.Errorf("the log: %q, %v", said, err)
	}
	// As if it had been unmounted.
	rec.Device = "0:9999"
	if c, err := r.lock(c.id); err != nil || c.Write(rec) != nil || c.Abandon() != nil {
		t.Fatal(err)
	}
	if got := list(t, r); len(got) != 0 {
		t.Errorf("listed %+v", got)
	}
}

// TestEnd: what a server could not do at its end is there for who unmounts, and for who lists meanwhile, once; nothing
// is left then, nor where the directory is mounted on again or is gone.
func TestEnd(t *testing.T) {
	r := testRunDir(t)
	unmount := func(rec Record) error { return r.Unmount(t.Context(), rec.Dir, false, time.Minute) }
	for name, after := range map[string]func(t *testing.T, rec Record){
		"umount": func(t *testing.T, rec Record) {
			if got := list(t, r); len(got) != 1 || got[0].State != Ended || got[0].LastWords != "disk full" || got[0].NBD != nil || got[0].Remedy() != "umount" {
				t.Errorf("listed %+v", got)
			}
			if err := unmount(rec); err == nil || !strings.Contains(err.Error(), rec.Dir) || !strings.Contains(err.Error(), "disk full") {
				t.Errorf("the first time: %v", err)
			}
			if err := unmount(rec); err == nil || !strings.Contains(err.Error(), "is not mounted by erofs-oci") {
				t.Errorf("the second time: %v", err)
			}
		},
		"mounted again": func(t *testing.T, rec Record) {
			c := claim(t, r, Record{Dir: rec.Dir})
			if got := list(t, r); len(got) != 1 || got[0].LastWords != "" {
				t.Errorf("listed %+v", got)
			}
			if err := c.Release(); err != nil {
				t.Error(err)
			}
		},
		"gone": func(t *testing.T, rec Record) {
			if err := os.Remove(rec.Dir); err != nil {
				t.Error(err)
			}
			if got := list(t, r); len(got) != 0 {
				t.Errorf("listed %+v", got)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			rec := Record{Dir: t.TempDir(), Device: "0:9999", NBD: json.RawMessage("[]")}
			c := claim(t, r, rec)
			if err := os.WriteFile(c.LogPath(), []byte("why\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := c.End("disk full"); err != nil {
				t.Fatal(err)
			}
			if said, err := os.ReadFile(c.LogPath()); err != nil || string(said) != "why\n" {
				t.Errorf("the log: %q, %v", said, err)
			}
			after(t, rec)
			if left, err := os.ReadDir(r.path); err != nil || len(left) != 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
	// A mount that is still there is dead; and who has nothing to say leaves nothing.
	for _, c := range []struct {
		rec  Record
		said string
		want []State
	}{{mountedRecord(t), "in use", []State{Dead}}, {Record{Dir: t.TempDir(), Device: "0:9999"}, "", nil}} {
		held := claim(t, r, c.rec)
		if err := held.End(c.said); err != nil {
			t.Fatal(err)
		}
		var got []State
		for _, e := range list(t, r) {
			got = append(got, e.State)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v: listed %v", c, got)
		}
		if err := r.remove(held.id); err != nil {
			t.Error(err)
		}
	}
}

// TestCheckUpper: what a mount without a server keeps what is written in is not
// given to another.
func TestCheckUpper(t *testing.T) {
	r := testRunDir(t)
	upper := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(upper, link); err != nil {
		t.Fatal(err)
	}
	check := func(dir, want string) {
		t.Helper()
		err := r.CheckUpper(dir)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", dir, err, want)
		}
	}
	check(upper, "")
	rec := mountedRecord(t)
	rec.Overlay = link
	c := claim(t, r, rec)
	check(upper, "") // its server holds the lock of the directory
	if err := c.Abandon(); err != nil {
		t.Fatal(err)
	}
	check(upper, "the mount on /, which is orphaned, keeps in "+upper+" what is written to it: erofs-oci reattach / first")
	check(link, "erofs-oci reattach / first")
	check(t.TempDir(), "")
	check(filepath.Join(upper, "no"), "")
	check("", "")
	c, _, err := r.Adopt("/")
	if err != nil {
		t.Fatal(err)
	}
	check(upper, "")
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	check(upper, "erofs-oci umount / first")
}

func TestWaitEnd(t *testing.T) {
	r := testRunDir(t)
	c := claim(t, r, Record{Dir: "/nowhere/b"})
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := r.waitEnd(short, c.id); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a live server: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- r.waitEnd(t.Context(), c.id) }()
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

func TestUnmountOfNothing(t *testing.T) {
	r := testRunDir(t)
	dir := t.TempDir()
	err := r.Unmount(t.Context(), dir, false, time.Second)
	if err == nil || !strings.Contains(err.Error(), "is not mounted by erofs-oci") {
		t.Fatalf("got %v", err)
	}
	if err := r.Unmount(t.Context(), dir+"/no", false, time.Second); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
}

func TestRecordThatIsNotOne(t *testing.T) {
	r := testRunDir(t)
	if err := os.WriteFile(r.file("x", ".json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := claim(t, r, Record{Dir: "/nowhere/d"})
	defer c.Release()
	got, err := r.List()
	if err == nil || !strings.Contains(err.Error(), "x.json") || len(got) != 1 {
		t.Fatalf("got %v, %v; want the error and the other mount", got, err)
	}
}

func TestPrivateDir(t *testing.T) {
	base := t.TempDir()
	fine := filepath.Join(base, "a", "b")
	for range 2 {
		if err := PrivateDir(fine); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(fine); err != nil || st.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v", st, err)
	}
	open := filepath.Join(base, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(base, "link")
	if err := os.Symlink(fine, link); err != nil {
		t.Fatal(err)
	}
	for dir, why := range map[string]string{open: "open to others", link: "not a directory"} {
		if err := PrivateDir(dir); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", dir, err, why)
		}
	}
	if os.Geteuid() == 0 {
		theirs := filepath.Join(base, "theirs")
		if err := os.Mkdir(theirs, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(theirs, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		if err := PrivateDir(theirs); err == nil || !strings.Contains(err.Error(), "belongs to uid 65534") {
			t.Errorf("somebody else's: %v", err)
		}
	}
}

func TestRunDirs(t *testing.T) {
	dirs := runDirs(func(k string) string {
		return map[string]string{"XDG_RUNTIME_DIR": "/run/user/5"}[k]
	})
	if len(dirs) < 2 || dirs[len(dirs)-2] != "/run/user/5/erofs-oci" || dirs[len(dirs)-1] != TempDir() {
		t.Errorf("got %q", dirs)
	}
	if d := runDirs(func(k string) string { return map[string]string{"EROFS_OCI_RUN_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}[k] }); len(d) != 1 || d[0] != "/a" {
		t.Errorf("EROFS_OCI_RUN_DIR: %q", d)
	}
	relative := runDirs(func(string) string { return "not/absolute" })
	if relative[0] != "/run/erofs-oci" && relative[0] != TempDir() {
		t.Errorf("a relative XDG_RUNTIME_DIR is taken: %q", relative)
	}
}

func TestRealDir(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("dir", filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(base)
	for _, in := range []string{"dir", "link", "./dir/../link/", dir + "//"} {
		if got, err := RealDir(in); err != nil || got != dir {
			t.Errorf("RealDir(%q) = %q, %v; want %q", in, got, err, dir)
		}
	}
}

func TestCheckTarget(t *testing.T) {
	base := t.TempDir()
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for dir, why := range map[string]string{file: "not a directory", base + "/no": "does not exist; mkdir it", file + "/x": "not a directory", "/": "root directory", "/usr/..": "root directory"} {
		if _, err := CheckTarget(dir); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", dir, err, why)
		}
	}
	if _, err := CheckTarget(base); err != nil {
		t.Error(err)
	}
}

func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 3 * maxLog / len(line) {
		if n, err := l.Write(line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + ".1"} {
		st, err := os.Stat(p)
		if err != nil || st.Size() == 0 || st.Size() > maxLog {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
}
