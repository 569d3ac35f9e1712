package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// treeOf makes a tree of lines: "a = text", "d/", "b => a" (a hard link), "s -> x", and whatever change does to the entry.
func treeOf(t *testing.T, lines []string, change map[string]func(*mkerofs.Entry)) *mkerofs.Builder {
	t.Helper()
	b, err := mkerofs.New(nil, mkerofs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		e := mkerofs.Entry{Mode: mkerofs.ModeRegular | 0o644, Mtime: time.Unix(1, 0)}
		name, rest, _ := strings.Cut(line, " ")
		e.Path = strings.TrimSuffix(name, "/")
		switch {
		case strings.HasSuffix(name, "/"):
			e.Mode = mkerofs.ModeDir | 0o755
		case strings.HasPrefix(rest, "=> "):
			e = mkerofs.Entry{Path: name, Link: rest[3:]}
		case strings.HasPrefix(rest, "-> "):
			e.Mode, e.Target = mkerofs.ModeSymlink|0o777, rest[3:]
		default:
			data := []byte(strings.TrimPrefix(rest, "= "))
			e.Size = int64(len(data))
			e.Open = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
		}
		if f := change[e.Path]; f != nil {
			f(&e)
		}
		if err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func diffOf(t *testing.T, a, b *mkerofs.Builder, ignored ...string) string {
	t.Helper()
	var found []string
	d := &treeDiff{ctx: t.Context(), ignored: map[string]bool{}, sides: [2]*mkerofs.Builder{a, b}}
	for _, i := range ignored {
		d.ignored[i] = true
	}
	d.report = func(f difference) bool { found = append(found, f.String()); return true }
	if err := d.run(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(found, "\n")
}

func TestDiff(t *testing.T) {
	base := []string{"a = one", "d/", "d/x = two", "d.b = three", "l => a", "s -> a", "z = last"}
	for _, c := range []struct {
		name    string
		lines   []string
		change  map[string]func(*mkerofs.Entry)
		ignored []string
		want    string
	}{
		{"the same", base, nil, nil, ""},
		{"less", []string{"a = one", "d/", "d.b = three", "l => a", "s -> a", "z = last"}, nil, nil, "d/x: only in A, a file"},
		{"more", append(base, "d/e/", "zz -> x"), nil, nil, "d/e: only in B, a directory\nzz: only in B, a symbolic link"},
		{"a type", []string{"a = one", "d/", "d/x/", "d.b = three", "l => a", "s -> a", "z = last"}, nil, nil, "d/x: type: a file, and a directory"},
		{"content", []string{"a = one", "d/", "d/x = twO", "d.b = three", "l => a", "s -> a", "z = last"}, nil, nil, "d/x: content: another byte at 2, and that of B"},
		{"content, ignored", []string{"a = one", "d/", "d/x = twO", "d.b = three", "l => a", "s -> a", "z = last"}, nil, []string{"content"}, ""},
		{"size", []string{"a = one", "d/", "d/x = twoo", "d.b = three", "l => a", "s -> a", "z = last"}, nil, nil, "d/x: size: 3, and 4"},
		{"target", []string{"a = one", "d/", "d/x = two", "d.b = three", "l => a", "s -> b", "z = last"}, nil, nil, "s: target: a, and b"},
		{"a link is a file", []string{"a = one", "d/", "d/x = two", "d.b = three", "l = onE", "s -> a", "z = last"}, nil, nil,
			"l: link: the same file as a, and a file of its own\nl: content: another byte at 2, and that of B"},
		{"links, ignored", []string{"a = one", "d/", "d/x = two", "d.b = three", "l = one", "s -> a", "z = last"}, nil, []string{"link"}, ""},
		{"another link", []string{"a = one", "d/", "d/x = two", "d.b = three", "l => d/x", "s -> a", "z = last"}, nil, nil,
			"l: link: the same file as a, and the same file as d/x\nl: content: another byte at 0, and that of B"},
		{"attributes", base, map[string]func(*mkerofs.Entry){
			"a":   func(e *mkerofs.Entry) { e.Mode |= 0o4000; e.UID = 1; e.Mtime = time.Unix(1, 5) },
			"d":   func(e *mkerofs.Entry) { e.GID = 7 },
			"s":   func(e *mkerofs.Entry) { e.Mode = mkerofs.ModeSymlink | 0o700 },
			"d.b": func(e *mkerofs.Entry) { e.Xattrs = map[string][]byte{"user.a": []byte("x\x00")} },
		}, nil, "a: mode: 0644, and 04644\na: owner: 0:0, and 1:0\na: time: 1970-01-01T00:00:01Z, and 1970-01-01T00:00:01.000000005Z\n" +
			"d: owner: 0:0, and 0:7\nd.b: xattr user.a: none, and \"x\\x00\""},
		{"attributes, ignored", base, map[string]func(*mkerofs.Entry){
			"a":   func(e *mkerofs.Entry) { e.Mode |= 0o4000; e.UID = 1; e.Mtime = time.Unix(1, 5) },
			"d.b": func(e *mkerofs.Entry) { e.Xattrs = map[string][]byte{"user.a": []byte("x\x00")} },
		}, []string{"mode", "owner", "time", "xattr"}, ""},
		{"a device", base, map[string]func(*mkerofs.Entry){
			"z": func(e *mkerofs.Entry) {
				*e = mkerofs.Entry{Path: "z", Mode: mkerofs.ModeChar | 0o644, Major: 1, Mtime: e.Mtime}
			},
		}, nil, "z: type: a file, and a character device"},
	} {
		if got := diffOf(t, treeOf(t, base, nil), treeOf(t, c.lines, c.change), c.ignored...); got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
}

// TestDiffStops: after as many differences as are wanted nothing more is read.
func TestDiffStops(t *testing.T) {
	a := treeOf(t, []string{"a = 1", "b = 1", "c = 1"}, map[string]func(*mkerofs.Entry){
		"b": func(e *mkerofs.Entry) { e.Open = func() (io.ReadCloser, error) { return nil, errors.New("was read") } },
	})
	d := &treeDiff{ctx: t.Context(), sides: [2]*mkerofs.Builder{a, treeOf(t, []string{"a = 2", "b = 2"}, nil)}}
	count := 0
	d.report = func(difference) bool { count++; return false }
	if err := d.run(); err != nil || count != 1 {
		t.Errorf("%d differences, %v", count, err)
	}
}

// TestDiffCannotRead: a file that cannot be read is an error that names it, not a difference.
func TestDiffCannotRead(t *testing.T) {
	for name, open := range map[string]func() (io.ReadCloser, error){
		"not opened": func() (io.ReadCloser, error) { return nil, os.ErrPermission },
		"too short":  func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("1")), nil },
	} {
		b := treeOf(t, []string{"a = 12"}, map[string]func(*mkerofs.Entry){"a": func(e *mkerofs.Entry) { e.Open = open }})
		d := &treeDiff{ctx: t.Context(), sides: [2]*mkerofs.Builder{treeOf(t, []string{"a = 12"}, nil), b}}
		d.report = func(f difference) bool { t.Errorf("%s: %s", name, f); return true }
		if err := d.run(); err == nil || !strings.HasPrefix(err.Error(), "a") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseIgnore(t *testing.T) {
	got, err := parseIgnore("owner,times,xattrs,links,content,mode")
	if err != nil || len(got) != 6 || !got["time"] || !got["xattr"] || !got["link"] {
		t.Errorf("%v, %v", got, err)
	}
	for _, list := range []string{"owner,", "size", "owner times"} {
		if _, err := parseIgnore(list); exitCode(err) != exitUsage {
			t.Errorf("%q: %v", list, err)
		}
	}
}

// TestDiffExitCodes: a script can tell a difference from trouble.
func TestDiffExitCodes(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"a/f": "1", "b/f": "1", "c/f": "2"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		code int
		said string
	}{
		{[]string{"--ignore=times", dir + "/a", dir + "/b"}, 0, ""},
		{[]string{"--ignore=times", dir + "/a", dir + "/c"}, 1, "erofs-oci: the trees differ\n"},
		{[]string{"--ignore=times", "--quiet", dir + "/a", dir + "/c"}, 1, ""},
		{[]string{"--quiet", dir + "/a", dir + "/missing"}, 2, "missing"},
		{[]string{"--quiet", dir + "/a", "127.0.0.1:1/x:y"}, 2, "127.0.0.1:1"},
		{[]string{"--ignore=size", dir + "/a", dir + "/b"}, 2, "--ignore"},
		{[]string{"--plain-http", "docker.io/library/a", "registry.example/b"}, 2, "are two"},
		{[]string{"--creds-stdin", "docker.io/library/a", "registry.example/b"}, 2, ""},
	} {
		code, _, stderr := command(t, append([]string{"diff"}, c.args...)...)
		if code != c.code || !strings.Contains(stderr, c.said) || c.said == "" && c.code == 1 && strings.Contains(stderr, "erofs-oci") {
			t.Errorf("%q: %d, %s; want %d, %s", c.args, code, stderr, c.code, c.said)
		}
	}
}

// TestBuildRefusesWhatDoesNothing: an option that does not count for a source is a mistake.
func TestBuildRefusesWhatDoesNothing(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "x.tar")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--layer=3", "-o", dir + "/o", "-"}, {"--platform=linux/arm64", "-o", dir + "/o", "-"}, {"--layer=0", "-o", dir + "/o", dir},
		{"--creds-stdin", "-o", dir + "/o", "-"}, {"--one-file-system", "-o", dir + "/o", file}, {"--one-file-system", "-o", dir + "/o", "x"},
	} {
		if code, _, stderr := command(t, append([]string{"build"}, args...)...); code != exitUsage {
			t.Errorf("%q: %d, %s", args, code, stderr)
		}
	}
	// The image is no part of itself, nor is the one that it replaces.
	out := filepath.Join(dir, "o.erofs")
	_, first, _ := command(t, "build", "-q", "-o", out, dir)
	code, again, stderr := command(t, "build", "-q", "--overwrite", "--source-date-epoch=1", "-o", out, dir)
	if code != 0 {
		t.Fatal(stderr)
	}
	if code, third, _ := command(t, "build", "-q", "--overwrite", "--source-date-epoch=1", "-o", out, dir); code != 0 || third != again || first == "" {
		t.Errorf("%d: %s, then %s", code, again, third)
	}
}

// TestBuildTempLimit: what an archive that cannot be read again is kept in counts, too, and an empty file is no archive.
func TestBuildTempLimit(t *testing.T) {
	dir := t.TempDir()
	archive := tarOf(t, "a = "+strings.Repeat("x", 100_000))
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	_, err := w.Write(archive)
	err = errors.Join(err, w.Close(), os.WriteFile(dir+"/a.tar.gz", compressed.Bytes(), 0o600), os.WriteFile(dir+"/e.tar", nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		said string
	}{
		{[]string{"--tmp-limit=64KiB", dir + "/a.tar.gz"}, "--tmp-limit allows more"},
		{[]string{"--max-size=64KiB", dir + "/a.tar.gz"}, "--max-size"},
		{[]string{dir + "/e.tar"}, "is empty"},
	} {
		code, _, stderr := command(t, append([]string{"build", "-o", dir + "/out"}, c.args...)...)
		if code != exitFailure || !strings.Contains(stderr, c.said) {
			t.Errorf("%q: %d, %s", c.args, code, stderr)
		}
	}
	if code, _, stderr := command(t, "build", "-o", dir+"/out", "--tmp-limit=256KiB", dir+"/a.tar.gz"); code != 0 {
		t.Error(stderr)
	}
	if left, err := filepath.Glob(dir + "/.out*"); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}
