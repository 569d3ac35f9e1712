package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
)

func TestParseRef(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for typed, want := range map[string]string{
		"/a/b": "file:/a/b", "/a/../b": "file:/b", "./x": "file:" + dir + "/x", "../x": "file:" + filepath.Dir(dir) + "/x",
		"file:x": "file:" + dir + "/x", "file:/x": "file:/x", "file:///x": "file:/x", "file:./a:b": "file:" + dir + "/a:b",
		"x": "docker.io/library/x:latest", "docker://x": "docker.io/library/x:latest", "host:5000/x:v1": "host:5000/x:v1",
	} {
		r, err := parseRef(typed)
		if err != nil || r.String() != want {
			t.Errorf("%s: %s, %v; want %s", typed, r, err, want)
			continue
		}
		if again, err := parseRef(r.String()); err != nil || again.path != r.path || again.registry != r.registry {
			t.Errorf("%s reads back as %+v, %v", r, again, err)
		}
	}
	for typed, want := range map[string]string{"./x": dir + "/x", "/x": "/x", "file:/x": "file:/x", "file:x": dir + "/x", "h:1/x": "h:1/x"} {
		if r, err := parseRef(typed); err != nil || r.mountName() != want {
			t.Errorf("%s is mounted as %s, %v; want %s", typed, r.mountName(), err, want)
		}
	}
	if _, err := parseRef("file:"); exitCode(err) != exitUsage {
		t.Errorf("file: without a path: %v", err)
	}
}

func TestParseMemory(t *testing.T) {
	for s, want := range map[string]int64{"0": -1, "1": 1, "7B": 7, "3K": 3 << 10, "64MiB": 64 << 20, "2G": 2 << 30, "8KiB": 8 << 10, "1T": 1 << 40} {
		if n, err := parseMemory(s); err != nil || n != want {
			t.Errorf("%s: %d, %v; want %d", s, n, err, want)
		}
	}
	for _, s := range []string{"", "M", "-1", "1P", "1.5M", "1KB", "1MM", "9223372036854775807G", "x"} {
		if _, err := parseMemory(s); exitCode(err) != exitUsage {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestReopenFiles: a mount goes on with the files that it began with, and with no
// others.
func TestReopenFiles(t *testing.T) {
	dir := t.TempDir()
	path, device := filepath.Join(dir, "image"), filepath.Join(dir, "device")
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(path, "image")
	write(device, "device")
	o := &opened{ref: imageRef{path: path}}
	if err := o.openFiles(t.Context(), []string{path, device}, 0); err != nil {
		t.Fatal(err)
	}
	var rec backend.Record
	o.record(&rec)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := reopenFiles(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	if v := again.volume(); again.id != o.id || v.Primary.Size() != 5 || len(v.Devices) != 1 || v.Devices[0].Size() != 6 {
		t.Errorf("opened %+v", v)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func() error{
		"written to": func() error { return os.WriteFile(device, []byte("DEVICE"), 0o600) },
		"touched":    func() error { return os.Chtimes(path, time.Time{}, time.Unix(1, 0)) },
		"replaced": func() error {
			st, err := os.Stat(path)
			next := path + ".new"
			return errors.Join(err, os.WriteFile(next, []byte("image"), 0o600), os.Chtimes(next, time.Time{}, st.ModTime()), os.Rename(next, path))
		},
		"gone": func() error { return os.Remove(path) },
	} {
		write(path, "image")
		write(device, "device")
		o := &opened{}
		if err := o.openFiles(t.Context(), []string{path, device}, 0); err != nil {
			t.Fatal(err)
		}
		rec := backend.Record{Dir: "/mnt"}
		o.record(&rec)
		if err := errors.Join(o.Close(), change()); err != nil {
			t.Fatal(err)
		}
		if _, err := reopenFiles(t.Context(), rec); err == nil {
			t.Errorf("%s: opened all the same", what)
		}
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := backend.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	behind := tail{f, 4}
	p := make([]byte, 6)
	if err := behind.ReadAt(t.Context(), p, 0); err != nil || string(p) != "456789" || behind.Size() != 6 {
		t.Errorf("%q, %v, %d bytes", p, err, behind.Size())
	}
	for _, off := range []int64{-1, 1, 1 << 62} {
		if err := behind.ReadAt(t.Context(), p, off); err == nil {
			t.Errorf("6 bytes at %d were read", off)
		}
	}
}

func TestParseFuseCall(t *testing.T) {
	c, err := parseFuseCall([]string{"-s", "image", "-oro,allow_other", "--device=a", "dir", "-f", "-o", `fsname=x\,y`, "--offset=512", "--device=b"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.operands, []string{"image", "dir"}) || !slices.Equal(c.options, []string{"ro", "allow_other", "fsname=x,y"}) ||
		!slices.Equal(c.devices, []string{"a", "b"}) || c.offset != 512 || !c.foreground {
		t.Errorf("got %+v", c)
	}
	if c, err := parseFuseCall([]string{"--", "-image", "-o"}); err != nil || !slices.Equal(c.operands, []string{"-image", "-o"}) {
		t.Errorf("got %+v, %v", c, err)
	}
	for _, args := range [][]string{{}, {"image"}, {"a", "b", "c"}, {"a", "b", "-x"}, {"a", "b", "--offset"}, {"a", "b", "--offset=-1"}, {"a", "b", "--device="}} {
		if _, err := parseFuseCall(args); exitCode(err) != exitUsage {
			t.Errorf("%q: %v", args, err)
		}
	}
	var stdout, stderr bytes.Buffer
	if code := run([]string{"erofs-oci", "fuse", "image"}, strings.NewReader(""), &stdout, &stderr); code != exitUsage || stdout.Len() > 0 {
		t.Errorf("exit code %d, %q", code, stdout.String())
	}
}
