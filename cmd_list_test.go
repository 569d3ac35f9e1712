package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// TestPrintListed: each state that somebody has to mend comes with the command.
func TestPrintListed(t *testing.T) {
	since := time.Date(2026, 5, 4, 3, 2, 1, 0, time.Local)
	digest := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	mounted := func(dir string, state backend.State) listed {
		return listed{Entry: backend.Entry{State: state, Record: backend.Record{
			Reference: "r.example/x:v1", Digest: digest, Backend: "nbd", Dir: dir, PID: 7, Since: since,
		}}}
	}
	stray := func(dir string) listed {
		return listed{NBDDevice: "/dev/nbd3", Entry: backend.Entry{State: backend.Stray, Record: backend.Record{Backend: "nbd", Dir: dir, PID: 9}}}
	}
	const head, row = "REF DIGEST BACKEND DIR PID SINCE BY FETCHED VERIFIED STATE", "r.example/x:v1 sha256:0123456789ab nbd /mnt 7 2026-05-04 03:02:01 - - - "
	for want, l := range map[string]listed{
		row + "running":                           mounted("/mnt", backend.Running),
		row + "dead: erofs-oci umount /mnt":       mounted("/mnt", backend.Dead),
		row + "orphaned: erofs-oci reattach /mnt": mounted("/mnt", backend.Orphaned),
		`r.example/x:v1 sha256:0123456789ab nbd "/m\n" 7 2026-05-04 03:02:01 - - - dead: erofs-oci umount "/m\n"`: mounted("/m\n", backend.Dead),
		"/dev/nbd3 - nbd - 9 - - - - stray: erofs-oci disconnect /dev/nbd3":                                       stray(""),
		"/dev/nbd3 - nbd /mnt 9 - - - - stray: umount /mnt":                                                       stray("/mnt"),
	} {
		var out bytes.Buffer
		if err := printListed(&out, []listed{l}); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(out.String(), "\n")
		for i, line := range lines {
			lines[i] = strings.Join(strings.Fields(line), " ")
		}
		if len(lines) != 3 || lines[0] != head || lines[1] != want {
			t.Errorf("got  %q\nwant %q", lines, want)
		}
	}
	var out bytes.Buffer
	if err := printListed(&out, nil); err != nil || out.Len() != 0 {
		t.Errorf("nothing: %q, %v", out.String(), err)
	}
}

// TestListedJSON: an entry is flat, and names its device only if that is all that
// there is.
func TestListedJSON(t *testing.T) {
	for want, l := range map[string]listed{
		"/dev/nbd3": {NBDDevice: "/dev/nbd3", Entry: backend.Entry{State: backend.Stray}},
		"":          {Entry: backend.Entry{State: backend.Dead}},
	} {
		b, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if name, ok := got["nbd_device"]; got["state"] != string(l.State) || ok != (want != "") || ok && name != want {
			t.Errorf("got %s", b)
		}
	}
}

// TestStraysOfUnreadRecords: of a record that makes no sense it is not concluded
// that its devices are stray.
func TestStraysOfUnreadRecords(t *testing.T) {
	require.Has(t, "root")
	entry := backend.Entry{Record: backend.Record{Dir: "/mnt", NBD: json.RawMessage(`{}`)}}
	if got, err := strays([]backend.Entry{entry}); len(got) != 0 || err == nil || !strings.Contains(err.Error(), "the record of /mnt") {
		t.Errorf("%v, %v", got, err)
	}
}

// What is not all of it is not 100 %, and no number is too large.
func TestPerCent(t *testing.T) {
	for _, c := range []struct {
		part, of int64
		want     string
	}{
		{0, 0, "-"}, {0, 1, "0%"}, {1, 3, "33%"}, {29, 100, "29%"}, {99, 100, "99%"}, {999, 1000, "99%"}, {1, 1, "100%"},
		{1<<62 - 1, 1 << 62, "99%"}, {1 << 62, 1 << 62, "100%"}, {1 << 61, 1 << 62, "50%"},
	} {
		if got := perCent(c.part, c.of); got != c.want {
			t.Errorf("%d of %d: %s, want %s", c.part, c.of, got, c.want)
		}
	}
}
