package profile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestEncode: what a file looks like, to the byte; and it is read back.
func TestEncode(t *testing.T) {
	for _, c := range []struct {
		name, want string
		blobs      []Blob
	}{
		{"nothing", `{"version":1,"blobs":{}}`, nil},
		{"nothing of a blob", `{"version":1,"blobs":{"A":{"size":7,"reads":[]}}}`, []Blob{{da, 7, nil}}},
		{"sorted", `{"version":1,"blobs":{"A":{"size":100,"reads":[[1,0,10],[2,20,5],[3,10,10]]},"B":{"size":9,"reads":[[0,0,9]]}}}`,
			[]Blob{{db, 9, []Read{{3, 0, 9}}}, {da, 100, []Read{{7, 20, 5}, {9, 10, 10}, {7, 0, 10}}}}},
		{"joined", `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,40]]}}}`,
			[]Blob{{da, 100, []Read{{0, 20, 10}, {0, 0, 10}, {1, 30, 10}, {0, 10, 10}}}}},
		{"overlapping", `{"version":1,"blobs":{"A":{"size":100,"reads":[[0,20,10],[1,10,10],[2,30,10],[3,0,10],[4,40,60]]}}}`,
			[]Blob{{da, 100, []Read{{5, 0, 100}, {4, 10, 30}, {1, 20, 10}}}}},
		{"the largest", `{"version":1,"blobs":{"A":{"size":281474976710656,"reads":[[0,281474976710655,1]]}}}`,
			[]Blob{{da, 1 << 48, []Read{{maxOrder, 1<<48 - 1, 1}}}}},
		{"not joined", `{"version":1,"blobs":{"A":{"size":9,"reads":[[0,0,3],[2,3,3]]},"B":{"size":9,"reads":[[1,3,3]]}}}`,
			[]Blob{{da, 9, []Read{{0, 0, 3}, {4, 3, 3}}}, {db, 9, []Read{{2, 3, 3}}}}},
	} {
		p, err := New(c.blobs)
		must(t, err)
		want := named(c.want) + "\n"
		if got := encoded(t, p); got != want {
			t.Errorf("%s:\n%swant\n%s", c.name, got, want)
		}
		if again := encoded(t, parsed(t, want)); again != want {
			t.Errorf("%s: read back and written again:\n%swant\n%s", c.name, again, want)
		}
	}
}

// TestParseAny: what is right and not in the canonical form is brought into it.
func TestParseAny(t *testing.T) {
	p := parsed(t, ` { "version" : 1, "blobs": {
		"B": { "reads": [[10, 5, 1], [3, 0, 6]], "size": 6 },
		"A": { "size": 4, "reads": [] } } } `)
	if got, want := encoded(t, p), named(`{"version":1,"blobs":{"A":{"size":4,"reads":[]},"B":{"size":6,"reads":[[0,0,6]]}}}`+"\n"); got != want {
		t.Errorf("%swant\n%s", got, want)
	}
}

// TestParseRefuses: whatever is wrong is said in a line, with the place.
func TestParseRefuses(t *testing.T) {
	blob := func(s string) string { return `{"version":1,"blobs":{"A":` + s + `}}` }
	read := func(s string) string { return blob(`{"size":100,"reads":[` + s + `]}`) }
	for _, c := range []struct {
		text string
		off  int64 // -1: wherever
		want string
	}{
		{``, 0, "unexpected EOF"},
		{`{"version":1,"blobs":{}`, 23, "unexpected EOF"},
		{`{"version":1,"blobs":{}} {`, 26, "something follows"},
		{`[]`, 1, `[ stands where '{' should`},
		{`{"blobs":{},"version":1}`, 21, `"version" is not known, or not where it should be`},
		{`{"version":2,"who":"knows"}`, 12, "it has version 2, and only version 1 is known here"},
		{`{"version":"1","blobs":{}}`, -1, "1 stands where a whole number"},
		{`{"version":1}`, -1, "not have both"},
		{`{"version":1,"version":1}`, -1, "twice"},
		{`{"version":1,"blobs":{},"more":1}`, -1, "more than 2 keys"},
		{blob(`{"size":1,"reads":[]},"A":{"size":1,"reads":[]}`), -1, "twice"},
		{`{"version":1,"blobs":{"sha256:abc":{"size":1,"reads":[]}}}`, -1, "not a digest"},
		{blob(`{"size":1}`), -1, "not have both"},
		{blob(`{"size":1,"size":1}`), -1, "twice"},
		{blob(`{"size":1,"chunk":2}`), -1, `"chunk" of a blob is not known`},
		{blob(`{"size":-1,"reads":[]}`), -1, "-1 stands where a whole number"},
		{blob(`{"size":1e2,"reads":[]}`), -1, "1e2 stands where a whole number"},
		{blob(`{"size":9223372036854775808,"reads":[]}`), -1, "9223372036854775808 stands where a whole number"},
		{read(`[0,0]`), -1, "] stands where a whole number"},
		{read(`[0,0,1,1]`), -1, `1 stands where ']' should`},
		{read(`[0,0,0]`), -1, "a read of 0 bytes at 0 does not lie in its 100 bytes"},
		{read(`[0,100,1]`), -1, "a read of 1 bytes at 100 does not lie in its 100 bytes"},
		{read(`[0,99,2]`), -1, "a read of 2 bytes at 99 does not lie in its 100 bytes"},
		{read(`[0,9223372036854775807,9223372036854775807]`), -1, "does not lie in its 100 bytes"},
		{read(`[2147483648,0,1]`), -1, "2147483648 stands where a whole number"},
		{read(`{"order":0}`), -1, `{ stands where '[' should`},
		{strings.Repeat("[", 1<<20), -1, `[ stands where '{' should`},
		{strings.Repeat(" ", maxFile+1), maxFile, "more than 67108864 bytes"},
	} {
		_, err := Parse([]byte(named(c.text)))
		var format *FormatError
		if !errors.As(err, &format) || c.off >= 0 && format.Off != c.off || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.80s: %v; want byte %d, %s", c.text, err, c.off, c.want)
		}
	}
}

// TestLimits: more than a profile may have is refused on the way in and on the way out.
func TestLimits(t *testing.T) {
	require.Long(t, "makes the largest profiles")
	many := strings.Repeat("[0,0,1],", maxReads)
	if _, err := Parse([]byte(named(`{"version":1,"blobs":{"A":{"size":9,"reads":[` + many + `[0,0,1]]}}}`))); err == nil || !strings.Contains(err.Error(), "more than 1048576 reads") {
		t.Errorf("too many reads: %v", err)
	}
	reads := make([]Read, maxReads+1)
	for i := range reads {
		reads[i] = Read{0, 2 * int64(i), 1}
	}
	p, err := New([]Blob{{da, 9_000_000, reads}})
	must(t, err)
	if _, err := p.Encode(); err == nil {
		t.Error("it is written")
	}
	var blobs strings.Builder
	for i := range maxBlobs + 1 {
		fmt.Fprintf(&blobs, `,"sha256:%064x":{"size":1,"reads":[]}`, i)
	}
	if _, err := Parse([]byte(`{"version":1,"blobs":{` + blobs.String()[1:] + `}}`)); err == nil || !strings.Contains(err.Error(), "more than 10000 keys") {
		t.Errorf("too many blobs: %v", err)
	}
}

// TestFile: a file is written whole or not at all, for its owner only, and nothing else is left.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "profile")
	p := parsed(t, `{"version":1,"blobs":{"A":{"size":4,"reads":[[0,0,4]]}}}`)
	for range 2 { // the second time in place of the first
		must(t, CheckFile(name))
		must(t, WriteFile(name, p))
	}
	got, err := ReadFile(name)
	must(t, err)
	if encoded(t, got) != encoded(t, p) {
		t.Errorf("read back %s", encoded(t, got))
	}
	if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// A link stays, and leads to the new one.
	link := filepath.Join(dir, "link")
	must(t, os.Symlink("profile", link))
	must(t, WriteFile(link, &Profile{}))
	if raw, err := os.ReadFile(name); err != nil || string(raw) != `{"version":1,"blobs":{}}`+"\n" {
		t.Errorf("behind the link: %q, %v", raw, err)
	}
	if st, err := os.Lstat(link); err != nil || st.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", st.Mode(), err)
	}
	must(t, os.WriteFile(name, []byte("nonsense"), 0o600))
	if _, err := ReadFile(name); err == nil || !strings.HasPrefix(err.Error(), name+": not a profile, at byte ") {
		t.Errorf("nonsense: %v", err)
	}
	for _, bad := range []string{dir, "/dev/null", filepath.Join(dir, "nosuch", "profile")} {
		if err := CheckFile(bad); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("CheckFile %s: %v", bad, err)
		}
		if err := WriteFile(bad, p); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("WriteFile %s: %v", bad, err)
		}
	}
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 2 {
		t.Errorf("left: %v", left)
	}
}

// TestReadFileOnly: what is no regular file is refused, and nobody waits for who might write to it.
func TestReadFileOnly(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	must(t, syscall.Mkfifo(fifo, 0o600))
	for _, name := range []string{fifo, dir, "/dev/null"} {
		failed := make(chan error, 1)
		go func() {
			_, err := ReadFile(name)
			failed <- err
		}()
		select {
		case err := <-failed:
			if want := name + ": it is not a regular file"; err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s: its reader waits", name)
		}
	}
}

// TestNamesItsFile: why a file cannot be written is said of the file that was named, and of no other.
func TestNamesItsFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "nosuch", "profile")
	want := name + ": no such file or directory"
	for what, err := range map[string]error{"CheckFile": CheckFile(name), "WriteFile": WriteFile(name, &Profile{})} {
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", what, err, want)
		}
	}
}

// FuzzParse: a profile is refused with one of our errors, or what it becomes is read back as the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{"version":1,"blobs":{}}`,
		`{"version":1,"blobs":{"A":{"size":100,"reads":[[0,0,10],[1,20,5]]},"B":{"size":9,"reads":[[0,0,9]]}}}`,
		`{"version":1,"blobs":{"A":{"size":100,"reads":[[5,0,100],[4,10,30],[1,20,10]]}}}`,
		`{"version":2}`, `[1`,
	} {
		f.Add([]byte(named(s)), uint16(10), uint16(4))
	}
	f.Fuzz(func(t *testing.T, raw []byte, budget, unit uint16) {
		p, err := Parse(raw)
		if err != nil {
			if !errors.As(err, new(*FormatError)) {
				t.Errorf("error %v", err)
			}
			return
		}
		out := encoded(t, p)
		again, err := Parse([]byte(out))
		must(t, err)
		if encoded(t, again) != out {
			t.Errorf("%sread back is\n%s", out, encoded(t, again))
		}
		if len(Diff(p, again)) != 0 {
			t.Errorf("%s is not the same as itself: %+v", out, Diff(p, again))
		}
		merged, err := Merge(p, again)
		must(t, err)
		if encoded(t, merged) != out {
			t.Errorf("%smerged with itself is\n%s", out, encoded(t, merged))
		}
		checkReads(t, p, int64(budget), int64(unit))
	})
}
