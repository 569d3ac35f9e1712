package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry/profile"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// profiled is the profile in a file, of which every blob is one of this many.
func profiled(t *testing.T, file string, blobs int) *profile.Profile {
	t.Helper()
	p, err := profile.ReadFile(file)
	must(t, err)
	if len(p.Blobs) != blobs {
		t.Fatalf("%d blobs, want %d: %+v", len(p.Blobs), blobs, p)
	}
	return p
}

// chunksOf are the chunks that a profile has of its only blob.
func chunksOf(t *testing.T, p *profile.Profile) map[int64]bool {
	t.Helper()
	chunks := map[int64]bool{}
	for _, r := range p.Blobs[0].Reads {
		if r.Off%chunk != 0 || r.Len%chunk != 0 && r.Off+r.Len != p.Blobs[0].Size {
			t.Errorf("%+v is not whole chunks", r)
		}
		for off := r.Off; off < r.Off+r.Len; off += chunk {
			chunks[off/chunk] = true
		}
	}
	return chunks
}

// fetchedChunks are those that the registry sent.
func (im servedImage) fetchedChunks(t *testing.T) map[int64]bool {
	t.Helper()
	chunks := map[int64]bool{}
	for _, r := range im.Requests() {
		if !strings.Contains(r.Path, "/blobs/") || r.Range == "" {
			continue
		}
		var first, last int64
		if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &first, &last); err != nil {
			t.Fatalf("range %q: %v", r.Range, err)
		}
		for c := first / chunk; c <= last/chunk; c++ {
			chunks[c] = true
		}
	}
	return chunks
}

// chunkOf is the chunk in which a byte of a file lies.
func (s *session) chunkOf(ref, path string, off int64) int64 {
	s.t.Helper()
	var node struct {
		Extents []struct {
			Offset, Length, PhysicalOffset int64
		}
	}
	must(s.t, json.Unmarshal([]byte(s.must("dump", "--json", ref, path)), &node))
	for _, e := range node.Extents {
		if off >= e.Offset && off < e.Offset+e.Length {
			return (e.PhysicalOffset + off - e.Offset) / chunk
		}
	}
	s.t.Fatalf("%s has no byte %d: %+v", path, off, node)
	return 0
}

// pick reads n bytes of a file, and has the kernel read nothing ahead.
func pick(t *testing.T, dir, name string, off int64, n int) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, name))
	must(t, err)
	defer f.Close()
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM))
	got := make([]byte, n)
	if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, content(name, bigSize)[off:off+int64(n)]) {
		t.Errorf("%d bytes of %s at %d: %v", n, name, off, err)
	}
}

// TestRecord: what is read of a mount is in the profile, and nothing else is; it is the same bytes whether it came from
// the registry or was here.
func TestRecord(t *testing.T) {
	require.Has(t, "kernel-erofs")
	im, s := served(t)
	// Of the big file: its middle, two chunks after each other, and what lies behind those.
	picks := []struct {
		off int64
		n   int
	}{{bigSize / 2, 4096}, {0, 2 * chunk}, {20 << 20, 4096}}
	// All metadata is in the first chunk.
	want := map[int64]bool{0: true, s.chunkOf(im.ref, deepFile, 0): true}
	for _, p := range picks {
		for c := s.chunkOf(im.ref, bigFile, p.off); c <= s.chunkOf(im.ref, bigFile, p.off+int64(p.n)-1); c++ {
			want[c] = true
		}
	}
	for _, backend := range []string{"fuse", "file"} {
		run := func(file string, flags ...string) []byte {
			t.Helper()
			dir := s.mount(im.ref, append([]string{"--backend=" + backend, "--record=" + file}, flags...)...)
			if got, err := os.ReadFile(filepath.Join(dir, deepFile)); err != nil || !bytes.Equal(got, content(deepFile, deepSize)) {
				t.Errorf("%s: %d bytes, %v", deepFile, len(got), err)
			}
			for _, p := range picks {
				pick(t, dir, bigFile, p.off, p.n)
			}
			s.must("umount", dir)
			raw, err := os.ReadFile(filepath.Join(s.dir, file))
			must(t, err)
			return raw
		}
		im.ResetStats()
		cold := run(backend+"-cold", "--cache-dir="+filepath.Join(s.dir, backend))
		got, fetched := chunksOf(t, profiled(t, filepath.Join(s.dir, backend+"-cold"), 1)), im.fetchedChunks(t)
		t.Logf("%s: %d chunks were read, %d fetched", backend, len(got), len(fetched))
		for c := range got {
			if !fetched[c] {
				t.Errorf("%s: chunk %d was read, they say, and never fetched", backend, c)
			}
		}
		// What is ahead of who goes forward is fetched, and not read.
		if len(fetched) <= len(got) {
			t.Errorf("%s: %d chunks were fetched, no more than %d", backend, len(fetched), len(got))
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: chunks %v were read, want %v", backend, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
		}
		im.ResetStats()
		warm := run(backend+"-warm", "--cache-dir="+filepath.Join(s.dir, backend))
		if gets := im.Stats().BlobGETs; gets != 0 {
			t.Errorf("%s: %d GETs, though all was here", backend, gets)
		}
		again := run(backend+"-again", "--cache-dir="+filepath.Join(s.dir, backend+"-again.cache"))
		if !bytes.Equal(cold, warm) || !bytes.Equal(cold, again) {
			t.Errorf("%s: three recordings of the same run:\n%s%s%s", backend, cold, warm, again)
		}
	}
	if out := s.must("profile", "diff", "fuse-cold", "fuse-again"); out != "no differences\n" {
		t.Errorf("diff says %q", out)
	}
}

// TestRecordKilled: a profile is there when the mount is, and what a killed server had written is whole.
func TestRecordKilled(t *testing.T) {
	t.Parallel()
	im, s := served(t)
	middle := s.chunkOf(im.ref, bigFile, bigSize/2)
	profiles := filepath.Join(s.dir, "profiles")
	must(t, os.Mkdir(profiles, 0o700))
	file := filepath.Join(profiles, "p")
	must(t, os.WriteFile(file, []byte("of another run"), 0o644))
	dir := s.mount(im.ref, "--record="+file)
	if got := chunksOf(t, profiled(t, file, 1)); !got[0] || got[middle] {
		t.Errorf("after the mount: %v", got)
	}
	pick(t, dir, bigFile, bigSize/2, 4096)
	has := func() bool { return chunksOf(t, profiled(t, file, 1))[middle] }
	must(t, awaitDir(profiles, "written again", has))
	s.end(dir, syscall.SIGKILL)
	if !has() {
		t.Error("it is gone")
	}
	if left, err := os.ReadDir(profiles); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	s.must("umount", dir)
	s.nothingLeft(dir)
}

// TestRecordForeground: a signal that ends the mount ends the recording in order; that the last of it cannot be written
// is said, and does not keep the mount from ending.
func TestRecordForeground(t *testing.T) {
	im, s := served(t)
	middle := s.chunkOf(im.ref, bigFile, bigSize/2)
	for _, away := range []bool{false, true} {
		profiles := filepath.Join(s.dir, fmt.Sprint("profiles-", away))
		must(t, os.Mkdir(profiles, 0o700))
		file := filepath.Join(profiles, "p")
		dir := s.target()
		cmd := s.serveHere(im.ref, dir, "--record="+file)
		pick(t, dir, bigFile, bigSize/2, 4096)
		if away {
			must(t, os.RemoveAll(profiles))
		}
		must(t, cmd.Process.Signal(syscall.SIGTERM))
		err := cmd.Wait()
		if away {
			if err == nil || !strings.Contains(cmd.stderr.String(), "what was read last is missing in the profile: "+file) {
				t.Errorf("%v, %q", err, cmd.stderr.String())
			}
		} else if err != nil || !chunksOf(t, profiled(t, file, 1))[middle] {
			t.Errorf("%v, %q", err, cmd.stderr.String())
		}
		s.nothingLeft(dir)
	}
}

// TestRecordLost: that the last of a recording could not be written is said by who unmounts, and once; after umount(8)
// by list, and in the log.
func TestRecordLost(t *testing.T) {
	im, s := served(t)
	lost := func() (dir string) {
		t.Helper()
		profiles := filepath.Join(s.dir, "profiles")
		must(t, os.Mkdir(profiles, 0o700))
		dir = s.mount(im.ref, "--record="+filepath.Join(profiles, "p"))
		pick(t, dir, bigFile, bigSize/2, 4096)
		must(t, os.RemoveAll(profiles))
		return dir
	}
	const why = "what was read last is missing in the profile: "
	dir := lost()
	if r := s.run(binary, "umount", dir); r.code != 1 || strings.Count(r.stderr, why) != 1 || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("umount: %+v", r)
	}
	s.nothingLeft(dir)

	dir = lost()
	server := s.pidfd(dir)
	must(t, unix.Unmount(dir, 0))
	awaitEnd(t, server)
	if e := s.entry(dir); e.State != "ended" || !strings.Contains(s.serverLog(dir), "the server has ended") || !strings.Contains(s.serverLog(dir), why) {
		t.Errorf("%+v; the log is %q", e, s.serverLog(dir))
	}
	if out := s.must("list"); !strings.Contains(out, "ended: erofs-oci umount "+dir) {
		t.Errorf("list says %q", out)
	}
	if r := s.run(binary, "umount", dir); r.code != 1 || strings.Count(r.stderr, why) != 1 {
		t.Errorf("umount: %+v", r)
	}
	s.nothingLeft(dir)
}

// TestRecordGoesOn: a mount that fetches what a profile says and records to the same file, by whatever name, has lost
// nothing of it when it is there, and adds what is read. One that is refused leaves it as it is.
func TestRecordGoesOn(t *testing.T) {
	im, s := served(t)
	file, link := filepath.Join(s.dir, "app.profile"), filepath.Join(s.dir, "link")
	must(t, os.Symlink(file, link))
	dir := s.mount(im.ref, "--record="+file)
	pick(t, dir, bigFile, bigSize/2, 4096)
	s.must("umount", dir)
	before := profiled(t, file, 1)
	middle, end := s.chunkOf(im.ref, bigFile, bigSize/2), s.chunkOf(im.ref, bigFile, bigSize-4096)
	if got := chunksOf(t, before); !got[middle] || got[end] {
		t.Fatalf("recorded %v", got)
	}
	for _, record := range []string{file, link} {
		dir = s.mount(im.ref, "--prefetch="+file, "--record="+record)
		if now := profiled(t, file, 1); !maps.Equal(chunksOf(t, now), chunksOf(t, before)) {
			t.Errorf("%s: when it is mounted: %v", record, chunksOf(t, now))
		}
		s.prefetched(dir, backend.PrefetchDone)
		s.must("umount", dir)
	}
	dir = s.mount(im.ref, "--prefetch="+link, "--record="+file)
	pick(t, dir, bigFile, bigSize-4096, 4096)
	s.must("umount", dir)
	now, want := profiled(t, file, 1), chunksOf(t, before)
	want[end] = true
	if got := chunksOf(t, now); !maps.Equal(got, want) {
		t.Errorf("in the end: %v, want %v", got, want)
	}
	had := before.Blobs[0].Reads
	if reads := now.Blobs[0].Reads; len(reads) < len(had) || !slices.Equal(reads[:len(had)], had) {
		t.Errorf("what was there comes first: %v, of %v", had, reads)
	}

	damaged, err := profile.New([]profile.Blob{{Digest: now.Blobs[0].Digest, Size: now.Blobs[0].Size + 1}})
	must(t, err)
	must(t, profile.WriteFile(file, damaged))
	r := s.run(binary, "mount", "--prefetch="+file, "--record="+file, im.ref, s.target())
	if r.code != 1 || !strings.Contains(r.stderr, "--record: "+file) {
		t.Errorf("another size: %+v", r)
	}
	if got := profiled(t, file, 1); got.Blobs[0].Size != damaged.Blobs[0].Size {
		t.Errorf("another size: %+v", got)
	}
}

// TestServeRecord: what an NBD client reads is recorded; offsets are those of the image, also where that is compressed.
func TestServeRecord(t *testing.T) {
	require.Has(t, "qemu-io")
	for name, o := range map[string]verifiable.Options{"raw": {Chunk: chunk}, "zstd": {Chunk: chunk, Zstd: true}} {
		v, s := serveVouched(t, o), newSession(t)
		server := s.serve("--record=p", "--nbd=unix:"+filepath.Join(s.dir, "socket"), v.ref)
		for _, at := range []string{"1M", "600k"} {
			if r := s.run("qemu-io", "-r", "-f", "raw", "-c", "read "+at+" 4k", server.uri); r.code != 0 {
				t.Fatalf("qemu-io: %s", r.stderr)
			}
		}
		server.stop(syscall.SIGTERM)
		got := chunksOf(t, profiled(t, filepath.Join(s.dir, "p"), 1))
		// qemu looks at the first sectors, too.
		delete(got, 0)
		if len(got) != 2 || !got[4] || !got[2] {
			t.Errorf("%s: chunks %v were read, want 2 and 4", name, got)
		}
	}
}
