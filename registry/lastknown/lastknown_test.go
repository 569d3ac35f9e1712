package lastknown

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func open(t *testing.T, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func entry(tag string) Entry {
	return Entry{Reference: "r.example/x:" + tag, Origin: "r.example/x (tls)", Digest: "sha256:" + strings.Repeat("a", 64)}
}

// TestPutGet: the last word counts, for who asks the same places in the same way.
func TestPutGet(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	want := entry("v1")
	for _, digest := range []string{"sha256:" + strings.Repeat("b", 64), want.Digest} {
		e := want
		e.Digest = digest
		if err := s.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := open(t, dir, Options{}).Get(want.Reference, want.Origin); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, other := range [][2]string{{"r.example/x:v2", want.Origin}, {want.Reference, "r.example/x (http)"}} {
		if got, err := s.Get(other[0], other[1]); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v: %+v, %v", other, got, err)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	if info, err := files[0].Info(); err != nil || info.Mode().Perm() != 0o600 || !isName(files[0].Name()) {
		t.Errorf("%s: %v, %v", files[0].Name(), info.Mode(), err)
	}
}

// TestGarbage: whatever lies under the name of a record is no record, and is replaced by the next one.
func TestGarbage(t *testing.T) {
	e := entry("v1")
	good, err := encode(e)
	if err != nil {
		t.Fatal(err)
	}
	other, err := encode(entry("v2"))
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]func(name string) error{
		"empty":     func(name string) error { return os.WriteFile(name, nil, 0o600) },
		"cut off":   func(name string) error { return os.WriteFile(name, good[:len(good)-9], 0o600) },
		"too long":  func(name string) error { return os.WriteFile(name, make([]byte, maxRecord+5), 0o600) },
		"another's": func(name string) error { return os.WriteFile(name, other, 0o600) },
		"link":      func(name string) error { return os.Symlink("/etc/passwd", name) },
		"pipe":      func(name string) error { return syscall.Mkfifo(name, 0o600) },
	}
	for i := range good {
		kinds[fmt.Sprintf("bit of byte %d", i)] = func(name string) error {
			bad := append([]byte{}, good...)
			bad[i] ^= 1 << (i % 8)
			return os.WriteFile(name, bad, 0o600)
		}
	}
	for kind, make := range kinds {
		dir := t.TempDir()
		s := open(t, dir, Options{})
		if err := make(filepath.Join(dir, nameOf(e.Reference, e.Origin))); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Get(e.Reference, e.Origin); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v, %v", kind, got, err)
		}
		if err := s.Put(e); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if got, err := s.Get(e.Reference, e.Origin); err != nil || got != e {
			t.Errorf("%s: put again: %+v, %v", kind, got, err)
		}
	}
}

// TestMost: the oldest record goes, and what is being written stays unless its writer is dead.
func TestMost(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{Most: 3})
	now := time.Now()
	for name, age := range map[string]time.Duration{newPrefix + "dead": 2 * staleAfter, newPrefix + "alive": 0, "stranger": 2 * staleAfter} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, now.Add(-age), now.Add(-age))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		e := entry(fmt.Sprint(i))
		if err := s.Put(e); err != nil {
			t.Fatal(err)
		}
		when := now.Add(time.Duration(i-10) * time.Minute)
		if err := errors.Join(os.Chtimes(filepath.Join(dir, nameOf(e.Reference, e.Origin)), when, when), s.Trim()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		e := entry(fmt.Sprint(i))
		if _, err := s.Get(e.Reference, e.Origin); (err == nil) != (i >= 2) {
			t.Errorf("record %d: %v", i, err)
		}
	}
	for name, stays := range map[string]bool{newPrefix + "dead": false, newPrefix + "alive": true, "stranger": true} {
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != stays {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	for i := range 4 {
		if err := s.Put(entry(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, nameOf("garbage", "")), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Remove(func(e Entry) (bool, error) { return strings.HasSuffix(e.Reference, "2"), nil }); n != 2 || err != nil {
		t.Errorf("%d removed, %v; want 2", n, err)
	}
	for i := range 4 {
		e := entry(fmt.Sprint(i))
		if _, err := s.Get(e.Reference, e.Origin); (err == nil) != (i != 2) {
			t.Errorf("record %d: %v", i, err)
		}
	}
}

// TestRemoveKeepsNew: what is written while it is asked whether the old one is to go was not asked about.
func TestRemoveKeepsNew(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	old, other := entry("v1"), entry("v1")
	other.Digest = "sha256:" + strings.Repeat("c", 64)
	for _, fresh := range []Entry{other, old} { // the same once more is another one, too
		if err := s.Put(old); err != nil {
			t.Fatal(err)
		}
		n, err := s.Remove(func(Entry) (bool, error) { return true, s.Put(fresh) })
		if n != 0 || err != nil {
			t.Errorf("%d removed, %v", n, err)
		}
		if got, err := s.Get(fresh.Reference, fresh.Origin); err != nil || got != fresh {
			t.Errorf("%+v, %v", got, err)
		}
	}
	why := errors.New("no answer")
	if n, err := s.Remove(func(Entry) (bool, error) { return false, why }); n != 0 || !errors.Is(err, why) {
		t.Errorf("%d removed, %v", n, err)
	}
}

// TestParallel: a reader meets a whole record, whoever writes it just then.
func TestParallel(t *testing.T) {
	dir := t.TempDir()
	e := entry("v1")
	if err := open(t, dir, Options{}).Put(e); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 4 {
		s := open(t, dir, Options{Most: 1})
		all.Go(func() {
			for range 50 {
				if err := s.Put(e); err != nil {
					t.Error(err)
				}
				if got, err := s.Get(e.Reference, e.Origin); err != nil || got != e {
					t.Errorf("%+v, %v", got, err)
				}
			}
		})
	}
	all.Wait()
}

func FuzzDecode(f *testing.F) {
	good, err := encode(entry("v1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("{}\n" + sumOf([]byte("{}\n"))))
	f.Add([]byte("\n00000000\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := decode(raw)
		if err != nil {
			return
		}
		again, err := encode(e)
		if err != nil {
			return // JSON may grow when it is written anew
		}
		if got, err := decode(again); err != nil || got != e {
			t.Errorf("%+v became %+v, %v", e, got, err)
		}
	})
}
