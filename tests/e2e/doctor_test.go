package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// diagnosis is what doctor --json prints.
type diagnosis struct {
	Findings []struct {
		For              []string
		Status, What, Do string
	}
	Backends []struct {
		Backend string
		Works   bool
		Why     string
	}
	Auto, Reason string
}

func (s *session) diagnosis() (diagnosis, result) {
	s.t.Helper()
	var d diagnosis
	r := s.run(binary, "doctor", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &d); err != nil {
		s.t.Fatalf("%v: %s%s", err, r.stdout, r.stderr)
	}
	return d, r
}

// works tells what a diagnosis says of a backend.
func (d diagnosis) works(backend string) bool {
	for _, b := range d.Backends {
		if b.Backend == backend {
			return b.Works
		}
	}
	return false
}

// TestDoctor: what it says can work does, and what is missing has its advice.
func TestDoctor(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveImage(t)
	s := newSession(t)
	out := s.must("doctor")
	for _, want := range []string{"/dev/fuse", "cache directory " + s.dir, "\nauto takes "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	d, r := s.diagnosis()
	if r.code != 0 || r.stderr != "" || len(d.Findings) != strings.Count(out, "\n")-1 || !d.works("fuse") || !d.works(d.Auto) {
		t.Errorf("%d, %s: %+v", r.code, r.stderr, d)
	}
	for _, f := range d.Findings {
		if len(f.For) == 0 || f.What == "" || (f.Status == "ok") != (f.Do == "") {
			t.Errorf("a finding: %+v", f)
		}
	}
	for _, b := range d.Backends {
		if b.Works {
			dir := s.mount(im.ref, "--backend="+b.Backend)
			showsImage(t, dir)
			s.endsWith(dir, "umount", dir)
		}
	}
}

// TestDoctorElsewhere: users, containers and user namespaces.
func TestDoctorElsewhere(t *testing.T) {
	require.Has(t, "root", "fuse", "setpriv", "unshare", "userns", "fusermount3")
	t.Run("plain user", func(t *testing.T) {
		s := newSession(t)
		s.asNobody()
		d, r := s.diagnosis()
		if r.code != 0 || d.Auto != "fuse" || d.Reason != "not nbd or file: not root (uid 65534)" {
			t.Errorf("%d, %s: %+v", r.code, r.stderr, d)
		}
	})
	t.Run("user namespace", func(t *testing.T) {
		s := newSession(t)
		s.asNobody()
		s.wrap = append(s.wrap, "unshare", "-Urm")
		d, r := s.diagnosis()
		if r.code != 0 || d.Auto != "fuse" || !strings.HasPrefix(d.Reason, "not nbd or file: in a user namespace") {
			t.Errorf("%d, %s: %+v", r.code, r.stderr, d)
		}
	})
	t.Run("user namespace without mounts", func(t *testing.T) {
		s := newSession(t)
		s.asNobody()
		s.wrap = append(s.wrap, "unshare", "-Ur")
		if d, r := s.diagnosis(); r.code != 1 || d.Auto != "" || !strings.Contains(d.Reason, "no right to mount, and /usr/bin/fusermount3 is not setuid root") {
			t.Errorf("%d, %s: %+v", r.code, r.stderr, d)
		}
	})
	t.Run("no new privileges", func(t *testing.T) {
		s := newSession(t)
		s.asNobody()
		s.wrap = append(s.wrap, "setpriv", "--no-new-privs")
		if d, r := s.diagnosis(); r.code != 1 || !strings.Contains(d.Reason, "no_new_privs") {
			t.Errorf("%d, %s: %+v", r.code, r.stderr, d)
		}
	})
	t.Run("no devices", func(t *testing.T) {
		s := newSession(t)
		s.wrap = []string{"unshare", "-m", "sh", "-c", `mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$0" "$@"`}
		wantLine(t, s.run(binary, "doctor"), "no backend can work here", "FUSE (open /dev/fuse: no such file or directory)")
	})
	t.Run("usage", func(t *testing.T) {
		if r := newSession(t).run(binary, "doctor", "everything"); r.code != 2 || r.stderr != "erofs-oci: doctor takes no arguments\n" {
			t.Errorf("%d, %q", r.code, r.stderr)
		}
	})
}
