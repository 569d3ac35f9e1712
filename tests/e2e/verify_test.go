package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// What the image of a vouched has: its files, and their sizes.
var vouchedFiles = map[string]int{"first": 300_000, "victim": 3 << 20, "last": 300_000}

// A vouched image can be verified, or not, as its blob was made.
type vouched struct {
	*fakeregistry.Registry
	*verifiable.Blob
	ref string
}

func serveVouched(t *testing.T, o verifiable.Options) *vouched {
	t.Helper()
	var image memory
	b, err := mkerofs.New(&image, mkerofs.Options{})
	must(t, err)
	for _, name := range []string{"first", "victim", "last"} {
		data := content(name, vouchedFiles[name])
		must(t, b.Add(mkerofs.Entry{Path: name, Mode: mkerofs.ModeRegular | 0o644, Mtime: time.Unix(1600000000, 0), Size: int64(len(data)),
			Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }}))
	}
	_, err = b.Finish(t.Context())
	must(t, err)
	r, err := fakeregistry.New(fakeregistry.Options{})
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	v := &vouched{Registry: r, Blob: verifiable.Make(t, image, o), ref: r.Addr() + "/vouched:v1"}
	_, err = ocipush.Push(t.Context(), r.URL(), "vouched:v1", v.Layers(), ocipush.Options{})
	must(t, err)
	r.ResetStats()
	return v
}

// victimAt is where in the blob, or in the frames of a compressed one, a byte in the middle
// of the victim is.
func (v *vouched) victimAt(t *testing.T) int64 {
	t.Helper()
	whole := content("victim", vouchedFiles["victim"])
	at := bytes.Index(v.Plain, whole[:4096])
	if at < 0 {
		t.Fatal("the victim is not in the image")
	}
	at += len(whole) / 2
	if len(v.Frames) > 0 {
		return int64(v.Frames[at/(256<<10)] + 100)
	}
	return int64(at)
}

// flip has a byte of the victim be wrong, whenever it is asked for.
func (v *vouched) flip(t *testing.T) {
	v.SetFault(fakeregistry.Always(fakeregistry.FlipBit(v.victimAt(t))).OnBlobs())
}

// readFiles reads all files in dir, in pieces, from the first to the last one. What comes
// is compared with what they should be: lies counts the pieces that came wrong, failed
// those that did not come, all of which must be EIO.
func readFiles(t *testing.T, dir string) (lies, failed int) {
	t.Helper()
	for _, name := range []string{"first", "victim", "last"} {
		f, err := os.Open(filepath.Join(dir, name))
		want := content(name, vouchedFiles[name])
		if errors.Is(err, syscall.EIO) {
			failed += (len(want) + 4095) / 4096
			continue
		}
		must(t, err)
		for off := 0; off < len(want); off += 4096 {
			p := want[off:min(off+4096, len(want))]
			got := make([]byte, len(p))
			switch _, err := f.ReadAt(got, int64(off)); {
			case errors.Is(err, syscall.EIO):
				failed++
			case err != nil:
				t.Errorf("%s at %d: %v", name, off, err)
			case !bytes.Equal(got, p):
				lies++
			}
		}
		must(t, f.Close())
	}
	return lies, failed
}

// status is what list says of the mount on dir.
func (s *session) status(dir string) backend.LayerStatus {
	s.t.Helper()
	var all []struct {
		Dir    string               `json:"dir"`
		Status *backend.MountStatus `json:"status"`
	}
	must(s.t, json.Unmarshal([]byte(s.run(binary, "list", "--json").stdout), &all))
	for _, e := range all {
		if e.Dir == dir && e.Status != nil && len(e.Status.Layers) == 1 {
			return e.Status.Layers[0]
		}
	}
	s.t.Fatalf("%s has no status: %+v", dir, all)
	return backend.LayerStatus{}
}

// verifiableKinds are by what a blob can be verified.
func verifiableKinds() map[string]struct {
	o  verifiable.Options
	by string
} {
	return map[string]struct {
		o  verifiable.Options
		by string
	}{
		"index": {verifiable.Options{Chunk: 256 << 10}, "chunk-index"},
		"apart": {verifiable.Options{Chunk: 64 << 10, Apart: true}, "chunk-index"},
		"tree":  {verifiable.Options{Verity: true}, "dm-verity"},
		"both":  {verifiable.Options{Chunk: 256 << 10, Verity: true}, "chunk-index"},
		"zstd":  {verifiable.Options{Chunk: 256 << 10, Zstd: true}, "chunk-index"},
	}
}

// TestVerifiedMount: a man in the middle changes a byte of a file. Whatever reads, by
// whatever it is verified, does not see it; all else is there.
func TestVerifiedMount(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	for name, kind := range verifiableKinds() {
		im := serveVouched(t, kind.o)
		for _, backend := range []string{"fuse", "file"} {
			t.Run(name+", "+backend, func(t *testing.T) {
				s := newSession(t)
				im.SetFault(nil)
				dir := s.mount(im.ref, "--backend="+backend, "--verify=require")
				if st := s.status(dir); st.By != kind.by || st.Fetched == 0 || st.Fetched == st.Size || st.Verified != st.Fetched {
					t.Errorf("mounted: %+v", st)
				}
				if lies, failed := readFiles(t, dir); lies+failed > 0 {
					t.Errorf("%d pieces are wrong, %d fail", lies, failed)
				}
				if out := s.must("list"); !strings.Contains(out, kind.by) || !strings.Contains(out, "running") {
					t.Errorf("list says %q", out)
				}
				s.must("umount", dir)

				s = newSession(t)
				im.flip(t)
				dir = s.mount(im.ref, "--backend="+backend)
				// The kernel's reader has a read fail of which another part would come.
				lies, failed := readFiles(t, dir)
				if lies > 0 || failed == 0 || failed > 2*(1<<20)/4096 {
					t.Errorf("a flipped bit: %d pieces are wrong, %d fail", lies, failed)
				}
				if log := s.serverLog(dir); !strings.Contains(log, "was changed") {
					t.Errorf("the log says %q", log)
				}
				if st := s.status(dir); st.Wrong != "" || st.Verified != st.Fetched {
					t.Errorf("a flipped bit: %+v", st)
				}
				s.must("umount", dir)
			})
		}
	}
}

// TestPlainUserVerifies: it takes no right of any kind.
func TestPlainUserVerifies(t *testing.T) {
	require.Has(t, "fusermount3")
	im := serveVouched(t, verifiable.Options{Verity: true})
	im.flip(t)
	s := newSession(t)
	s.asNobody()
	dir := s.nobodysTarget()
	s.must("mount", "--verify=require", im.ref, dir)
	if r := s.run("cksum", filepath.Join(dir, "first")); !strings.HasPrefix(r.stdout, s.ownCksum(content("first", vouchedFiles["first"]))+" ") {
		t.Errorf("first: %q, %s", r.stdout, r.stderr)
	}
	if r := s.run("cat", filepath.Join(dir, "victim")); r.code == 0 || !strings.Contains(r.stderr, "Input/output error") {
		t.Errorf("victim: exit code %d, %s", r.code, r.stderr)
	}
	s.must("umount", dir)
}

// recordSays waits until the record of the session's only mount has some words.
func (s *session) recordSays(words string) {
	s.t.Helper()
	run := filepath.Join(s.dir, "run")
	says := func() bool {
		names, err := filepath.Glob(filepath.Join(run, "*.json"))
		if err != nil || len(names) != 1 {
			return false
		}
		b, err := os.ReadFile(names[0])
		return err == nil && bytes.Contains(b, []byte(words))
	}
	must(s.t, awaitDir(run, "the record says "+words, says))
}

// TestPoisonedMount: without anything to verify parts by, the whole is verified when it is
// here. That it is wrong ends the service, and everybody says so.
func TestPoisonedMount(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs")
	im := serveVouched(t, verifiable.Options{})
	for _, backend := range []string{"fuse", "file"} {
		t.Run(backend, func(t *testing.T) {
			s := newSession(t)
			im.flip(t)
			dir := s.target()
			server := s.serveHere(im.ref, dir, "--backend="+backend)
			held, err := os.Open(filepath.Join(dir, "last"))
			must(t, err)
			defer held.Close()
			lies, _ := readFiles(t, dir) // what comes before the last byte is here cannot be known to be wrong
			s.recordSays("was changed")
			if backend == "fuse" {
				// The kernel had it all in its page cache.
				await(t, "every read fails", func() bool {
					_, failed := readFiles(t, dir)
					return failed == pieces()
				})
				if _, err := held.ReadAt(make([]byte, 10), 0); !errors.Is(err, syscall.EIO) {
					t.Errorf("of a file that was open: %v", err)
				}
			} else {
				must(t, syncDrop())
				if after, failed := readFiles(t, dir); after > lies || failed == 0 {
					t.Errorf("after that %d pieces are wrong, %d fail", after, failed)
				}
			}
			must(t, held.Close())
			r := s.run(binary, "list")
			if r.code != 3 || !strings.Contains(r.stdout, "not what the manifest says") || !strings.Contains(r.stderr, dir) {
				t.Errorf("list: exit code %d, %q, %q", r.code, r.stdout, r.stderr)
			}
			if st := s.status(dir); st.By != "none" || st.Verified != 0 || st.Wrong == "" {
				t.Errorf("status: %+v", st)
			}
			if r := s.run(binary, "umount", dir); r.code != 3 || !strings.Contains(r.stderr, "was changed") {
				t.Errorf("umount: exit code %d, %q", r.code, r.stderr)
			}
			err = server.Wait()
			if server.ProcessState.ExitCode() != 3 {
				t.Errorf("mount --foreground: %v", err)
			}
			said := server.stderr.String()
			if !strings.Contains(said, "was changed") || (backend == "file") != strings.Contains(said, "the kernel goes on to show what it has read") {
				t.Errorf("mount --foreground said %q", said)
			}
			s.nothingLeft(dir)
		})
	}
}

// pieces is how many readFiles reads.
func pieces() (n int) {
	for _, size := range vouchedFiles {
		n += (size + 4095) / 4096
	}
	return n
}

// TestUnverifiedIsSaid: what was not verified is not called verified; what was, as a whole,
// is.
func TestUnverifiedIsSaid(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveVouched(t, verifiable.Options{})
	s := newSession(t)
	dir := s.mount(im.ref)
	if st := s.status(dir); st.By != "none" || st.Verified != 0 || st.Fetched == 0 {
		t.Errorf("mounted: %+v", st)
	}
	if out := s.must("list"); !strings.Contains(out, "none") || !strings.Contains(out, " 0%") {
		t.Errorf("list says %q", out)
	}
	if lies, failed := readFiles(t, dir); lies+failed > 0 {
		t.Errorf("%d pieces are wrong, %d fail", lies, failed)
	}
	await(t, "all is read", func() bool { return s.status(dir).By == "whole-blob" })
	if out := s.must("list"); !strings.Contains(out, "100%") {
		t.Errorf("list says %q", out)
	}
	off := s.mount(im.ref, "--verify=off")
	if lies, failed := readFiles(t, off); lies+failed > 0 {
		t.Errorf("off: %d pieces are wrong, %d fail", lies, failed)
	}
	if st := s.status(off); st.By != "none" || st.Verified != 0 {
		t.Errorf("off: %+v", st)
	}
	r := s.run(binary, "mount", "--verify=require", im.ref, s.target())
	if r.code != 1 || !strings.Contains(r.stderr, "no chunk index and no dm-verity tree") {
		t.Errorf("require: exit code %d, %q", r.code, r.stderr)
	}
	if r := s.run(binary, "mount", "--verify=perhaps", im.ref, s.target()); r.code != 2 {
		t.Errorf("perhaps: exit code %d, %q", r.code, r.stderr)
	}
}

// TestVerifyCommands: commands that read an image by themselves verify it, too.
func TestVerifyCommands(t *testing.T) {
	im := serveVouched(t, verifiable.Options{Verity: true})
	plain := serveVouched(t, verifiable.Options{})
	s := newSession(t)
	if got := s.must("cat", "--verify=require", im.ref, "victim"); got != string(content("victim", vouchedFiles["victim"])) {
		t.Errorf("cat: %d bytes", len(got))
	}
	s.must("extract", "--keep=times", plain.ref, filepath.Join(s.dir, "right"))
	im.flip(t)
	plain.flip(t)
	s = newSession(t) // without what was fetched before that
	if r := s.run(binary, "cat", im.ref, "victim"); r.code != 1 || !strings.Contains(r.stderr, "was changed") {
		t.Errorf("cat: exit code %d, %q", r.code, r.stderr)
	}
	if got := s.must("cat", im.ref, "last"); got != string(content("last", vouchedFiles["last"])) {
		t.Errorf("cat: %d bytes", len(got))
	}
	r := s.run(binary, "extract", "--keep=times", plain.ref, filepath.Join(s.dir, "wrong"))
	if r.code != 3 || !strings.Contains(r.stderr, "was changed") {
		t.Errorf("extract of all: exit code %d, %q", r.code, r.stderr)
	}
	if r := s.run(binary, "ls", "--verify=require", plain.ref); r.code != 1 || !strings.Contains(r.stderr, "--verify=auto") {
		t.Errorf("ls: exit code %d, %q", r.code, r.stderr)
	}
}

// TestServeVerifies: a client of the network block device gets what is verified, too.
func TestServeVerifies(t *testing.T) {
	require.Has(t, "nbdcopy")
	im := serveVouched(t, verifiable.Options{Chunk: 256 << 10, Verity: true})
	s := newSession(t)
	out := filepath.Join(s.dir, "copied")
	im.flip(t)
	v := s.serve("--nbd", "unix:"+filepath.Join(s.dir, "socket"), "--verify=require", im.ref)
	if r := s.run("nbdcopy", v.uri, out); r.code == 0 || !strings.Contains(r.stderr, "Input/output error") {
		t.Errorf("a flipped bit: exit code %d, %q", r.code, r.stderr)
	}
	im.SetFault(nil)
	s.quiet("nbdcopy", v.uri, out)
	if got, err := os.ReadFile(out); err != nil || !bytes.HasPrefix(got, im.Plain) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	must(t, v.cmd.Process.Signal(syscall.SIGTERM))
	must(t, v.cmd.Wait())

	plain := serveVouched(t, verifiable.Options{})
	plain.flip(t)
	v = s.serve("--nbd", "unix:"+filepath.Join(s.dir, "socket2"), plain.ref)
	await(t, "every read fails", func() bool { return s.run("nbdcopy", v.uri, out).code != 0 })
	must(t, v.cmd.Process.Signal(syscall.SIGTERM))
	err := v.cmd.Wait()
	if code := v.cmd.ProcessState.ExitCode(); code != 3 || !strings.Contains(v.stderr.String(), "was changed") {
		t.Errorf("%v, %q", err, v.stderr.String())
	}
}

// TestCompressedLayer: one without an index is fetched whole, and that is said.
func TestCompressedLayer(t *testing.T) {
	require.Has(t, "root", "fuse")
	im := serveVouched(t, verifiable.Options{Zstd: true})
	s := newSession(t)
	dir := s.target()
	r := s.run(binary, "mount", "--verify=require", im.ref, dir)
	if r.code != 0 || !strings.Contains(r.stderr, "are fetched first") || strings.Count(r.stderr, "\n") != 1 {
		t.Fatalf("exit code %d, %q", r.code, r.stderr)
	}
	if stats := im.Stats(); stats.BlobGETs != 1 || stats.BlobBytes != int64(len(im.Data)) {
		t.Errorf("%d GETs of the blob, %d bytes of %d", stats.BlobGETs, stats.BlobBytes, len(im.Data))
	}
	if lies, failed := readFiles(t, dir); lies+failed > 0 {
		t.Errorf("%d pieces are wrong, %d fail", lies, failed)
	}
	if st := s.status(dir); st.By != "whole-blob" || st.Verified != st.Size {
		t.Errorf("%+v", st)
	}
	s.must("umount", dir)
	im.SetFault(fakeregistry.Always(fakeregistry.FlipBit(int64(len(im.Data) - 1))).OnBlobs())
	if r := newSession(t).run(binary, "mount", im.ref, dir); r.code == 0 {
		t.Error("a changed layer is mounted")
	}
	// Who has it is not concerned.
	im.ResetStats()
	if r := s.run(binary, "mount", im.ref, dir); r.code != 0 || !strings.Contains(r.stderr, "are decompressed first") || im.Stats().BlobGETs != 0 {
		t.Fatalf("exit code %d, %q, %+v", r.code, r.stderr, im.Stats())
	}
	if lies, failed := readFiles(t, dir); lies+failed > 0 {
		t.Errorf("from the cache: %d pieces are wrong, %d fail", lies, failed)
	}
	s.must("umount", dir)
}

// await asks again and again, for what no event tells of.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// syncDrop has the kernel drop what it has in its page caches.
func syncDrop() error {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		return fmt.Errorf("drop the page cache: %w", err)
	}
	return nil
}
