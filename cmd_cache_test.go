package main

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

func TestKeepOptions(t *testing.T) {
	for _, c := range []struct {
		keep keepOptions
		want blobcache.Options
	}{
		{keepOptions{}, blobcache.Options{}},
		{keepOptions{size: "1MiB"}, blobcache.Options{MaxBytes: 1 << 20}},
		{keepOptions{size: "unlimited", minFree: "0"}, blobcache.Options{MaxBytes: -1, MinFree: -1}},
		{keepOptions{size: "2GiB", minFree: "1T", paranoid: true}, blobcache.Options{MaxBytes: 2 << 30, MinFree: 1 << 40, Paranoid: true}},
	} {
		if got, err := c.keep.options(nil); err != nil || c.keep.check() != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v: %+v, %v; want %+v", c.keep, got, err, c.want)
		}
	}
	for _, k := range []keepOptions{{size: "0"}, {size: "1"}, {size: "1023KiB"}, {size: "10%"}, {size: "none"}, {size: "-1"}, {minFree: "x"}, {minFree: "1.5G"}, {size: "9223372036854775807T"}} {
		if err := k.check(); err == nil || exitCode(err) != exitUsage {
			t.Errorf("%+v: %v", k, err)
		}
	}
}

// A server that takes over a mount keeps as much as the one before.
func TestKeepIsRecorded(t *testing.T) {
	s := &sourceOptions{keep: keepOptions{size: "1GiB", minFree: "2GiB", paranoid: true}}
	a := s.access()
	if got := keptOptions(a); got != s.keep {
		t.Errorf("%+v, want %+v", got, s.keep)
	}
	if o, err := keptOptions(a).options(slog.Default()); err != nil || o.MaxBytes != 1<<30 || o.Logger == nil {
		t.Errorf("%+v, %v", o, err)
	}
}

// Another process is waited for no longer than the network would be, and what was waited counts for the network.
func TestPatienceWithOthers(t *testing.T) {
	for _, c := range []struct {
		wait    time.Duration
		offline bool
		want    time.Duration
	}{
		{time.Minute, false, 20 * time.Second}, {5 * time.Second, false, 5 * time.Second},
		{0, false, 0}, {registry.NoWait, false, 0}, {time.Minute, true, time.Millisecond},
	} {
		s := &sourceOptions{client: registry.Options{ErrorWait: c.wait}, offline: c.offline}
		if o, err := s.cacheOptions(slog.Default()); err != nil || o.Patience != c.want || o.Waiting == nil {
			t.Errorf("wait of %v: patience of %v, %v; want %v", c.wait, o.Patience, err, c.want)
		}
	}
}

const cachedSize = 1 << 20

// cached makes a cache directory in which all of some blobs is; their digests begin with these digits. It gives their
// digests, and the names of their files.
func cached(t *testing.T, digits ...string) (dir string, digests, files []string) {
	t.Helper()
	dir = t.TempDir()
	c, err := blobcache.New(dir, blobcache.Options{MinFree: -1})
	must(t, err)
	for _, d := range digits {
		hex := d + strings.Repeat("0", 64-len(d))
		digests = append(digests, "sha256:"+hex)
		b, err := c.Open("sha256:"+hex, cachedSize, pattern(cachedSize), blobcache.OpenOptions{})
		must(t, err)
		must(t, b.ReadAt(t.Context(), make([]byte, cachedSize), 0))
		must(t, b.Close())
		names, err := filepath.Glob(filepath.Join(dir, "v1", "sha256-"+hex+"*"))
		must(t, err)
		files = append(files, names...)
	}
	must(t, c.Close())
	if len(files) != len(digits) {
		t.Fatalf("files: %q", files)
	}
	return dir, digests, files
}

// TestBrokenCacheFiles: files that are broken are shown, counted as damage once, and gone.
func TestBrokenCacheFiles(t *testing.T) {
	dir, digests, files := cached(t, "a", "b", "c")
	must(t, os.WriteFile(files[0], []byte("0123456789abcdef"), 0o600))
	must(t, os.Truncate(files[1], 4096))
	code, out, stderr := command(t, "cache", "ls", "--cache-dir="+dir)
	for _, d := range digests[:2] {
		if line := regexp.MustCompile(d + ` +- +0 +262144 +- +idle; the file is damaged: cache verify removes it\n`); !line.MatchString(out) {
			t.Errorf("ls says nothing of %s:\n%s", d, out)
		}
	}
	if stderr != "" || code != 0 || strings.Count(out, "\n") != 4 {
		t.Errorf("ls: exit code %d, %q and\n%s", code, stderr, out)
	}
	code, out, stderr = command(t, "cache", "verify", "--cache-dir="+dir)
	if code != exitFailure || !strings.Contains(stderr, "erofs-oci: 2 files were damaged as a whole; they are removed") ||
		!regexp.MustCompile(digests[2]+` +4 +0\n(.* +- +all\n){2}$`).MatchString(out) {
		t.Errorf("verify: exit code %d, %q and\n%s", code, stderr, out)
	}
	code, out, stderr = command(t, "cache", "verify", "--cache-dir="+dir)
	if code != 0 || stderr != "" || strings.Count(out, "\n") != 2 {
		t.Errorf("verify again: exit code %d, %q and\n%s", code, stderr, out)
	}
}

// TestRemoveReadsItsArguments: nothing is removed by a command line that makes no sense. One that names what is not there
// removes the rest, and says how much that was.
func TestRemoveReadsItsArguments(t *testing.T) {
	dir, digests, files := cached(t, "a")
	for _, bad := range []string{"sha256:x", "x", "", "--json"} {
		code, out, stderr := command(t, "cache", "rm", "--cache-dir="+dir, digests[0], bad)
		_, err := os.Stat(files[0])
		if code != exitUsage || out != "" || !strings.Contains(stderr, bad) || err != nil {
			t.Errorf("%q: exit code %d, %q, %q; %v", bad, code, out, stderr, err)
		}
	}
	missing := "sha256:" + strings.Repeat("f", 64)
	code, out, stderr := command(t, "cache", "rm", "--cache-dir="+dir, missing, digests[0])
	_, err := os.Stat(files[0])
	if code != exitFailure || !regexp.MustCompile(`^[1-9][0-9]* bytes freed\n$`).MatchString(out) || !strings.Contains(stderr, missing) || err == nil {
		t.Errorf("exit code %d, %q, %q; %v", code, out, stderr, err)
	}
}

// TestEmptyIsNoDefault: a flag whose value is an empty variable is an error, and not the flag that was not given.
func TestEmptyIsNoDefault(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"check", "--on-error=wait:1ms", "--verify=", "127.0.0.1:1/x:v1"}, "--verify needs auto, require or off"},
		{[]string{"ls", "--on-error=wait:1ms", "--cache-size=", "127.0.0.1:1/x:v1"}, "--cache-size needs a size"},
		{[]string{"ls", "--on-error=wait:1ms", "--cache-min-free=", "127.0.0.1:1/x:v1"}, "--cache-min-free needs a size"},
		{[]string{"cache", "du", "--cache-size="}, "--cache-size needs a size"},
		{[]string{"cache", "du", "--cache-min-free="}, "--cache-min-free needs a size"},
		{[]string{"cache", "du", "--cache-size=1"}, "--cache-size 1: want 1MiB or more"},
	} {
		if code, out, stderr := command(t, c.args...); code != exitUsage || out != "" || !strings.HasPrefix(stderr, "erofs-oci: "+c.want) {
			t.Errorf("%q: exit code %d, %q", c.args, code, stderr)
		}
	}
}

// TestLookingMakesNothing: who only looks at the cache makes no directory. The usual one that is not there yet is an empty
// cache; one that was named is a mistake.
func TestLookingMakesNothing(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	home := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", filepath.Join(home, "caches"))
	usual := filepath.Join(home, "caches", "erofs-oci")
	untouched := func(t *testing.T) {
		t.Helper()
		if left, err := os.ReadDir(home); err != nil || len(left) != 0 {
			t.Errorf("there is %v now; %v", left, err)
		}
	}
	for _, c := range []struct {
		args   []string
		code   int
		out    string // a pattern
		stderr string
	}{
		{[]string{"ls"}, 0, `^$`, ""},
		{[]string{"ls", "--json"}, 0, `^\[\]\n$`, ""},
		{[]string{"verify"}, 0, `^$`, ""},
		{[]string{"verify", "--json"}, 0, `^\[\]\n$`, ""},
		{[]string{"prune"}, 0, `^0 bytes freed\n$`, ""},
		{[]string{"prune", "--json"}, 0, `"freed": 0`, ""},
		{[]string{"du"}, 0, `^directory +` + usual + `\nblobs +0\nkept +0 bytes\nlimit +[1-9]`, ""},
		{[]string{"du", "--json", "--cache-size=3MiB", "--cache-min-free=0"}, 0, `"limit": 3145728,\n *"free": [1-9][0-9]*,\n *"min_free": 0\n`, ""},
		{[]string{"rm", digest}, exitFailure, `^0 bytes freed\n$`, "erofs-oci: blob " + digest + " is not in the cache: " + usual + " does not exist\n"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			code, out, stderr := command(t, append([]string{"cache"}, c.args...)...)
			if code != c.code || !regexp.MustCompile(c.out).MatchString(out) || stderr != c.stderr {
				t.Errorf("usual: exit code %d, %q, %q", code, out, stderr)
			}
			untouched(t)
			typo := filepath.Join(home, "typo")
			named := slices.Insert(slices.Clone(c.args), 1, "--cache-dir="+typo)
			code, out, stderr = command(t, append([]string{"cache"}, named...)...)
			if code != exitFailure || out != "" || stderr != "erofs-oci: cache directory "+typo+" does not exist; look at --cache-dir\n" {
				t.Errorf("named: exit code %d, %q, %q", code, out, stderr)
			}
			untouched(t)
		})
	}
	for flag, want := range map[string]string{
		"--offline": "127.0.0.1:1/x:v1: nothing is kept in " + usual + ": " + errNeverMounted.Error(),
		"--cache-dir=" + filepath.Join(home, "typo"): "cache directory " + filepath.Join(home, "typo") + " does not exist; look at --cache-dir",
	} {
		code, _, stderr := command(t, "ls", "--offline", flag, "127.0.0.1:1/x:v1")
		if code != exitFailure || stderr != "erofs-oci: "+want+"\n" {
			t.Errorf("%s: exit code %d, %q", flag, code, stderr)
		}
		untouched(t)
	}
}

// A directory that is there, and in which no cache was made yet, is an empty one, and stays as it is.
func TestLookingIntoAnEmptyDirectory(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{{"ls"}, {"du"}, {"verify"}, {"prune"}} {
		code, _, stderr := command(t, append([]string{"cache"}, append(args, "--cache-dir="+dir)...)...)
		left, err := os.ReadDir(dir)
		if code != 0 || stderr != "" || err != nil || len(left) > 0 {
			t.Errorf("%s: exit code %d, %q; there is %v now; %v", args, code, stderr, left, err)
		}
	}
}

// A blob that was never read has no time of its last use, and not that of the year 1.
func TestNeverReadHasNoTime(t *testing.T) {
	dir, _, _ := cached(t, "a")
	c, err := blobcache.New(dir, blobcache.Options{MinFree: -1})
	must(t, err)
	b, err := c.Open("sha256:"+strings.Repeat("b", 64), cachedSize, pattern(cachedSize), blobcache.OpenOptions{})
	must(t, err)
	must(t, errors.Join(b.Close(), c.Close()))
	code, out, stderr := command(t, "cache", "ls", "--json", "--cache-dir="+dir)
	var list []map[string]any
	must(t, json.Unmarshal([]byte(out), &list))
	if code != 0 || len(list) != 2 {
		t.Fatalf("exit code %d, %q and\n%s", code, stderr, out)
	}
	if when, err := time.Parse(time.RFC3339, list[0]["used"].(string)); err != nil || time.Since(when) > time.Hour {
		t.Errorf("read at %v, %v", when, err)
	}
	if when, there := list[1]["used"]; there {
		t.Errorf("never read, and used %v", when)
	}
}
