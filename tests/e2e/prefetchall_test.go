package e2e

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry/profile"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// showsEverything fails the test unless every file of a servedImage is right.
func showsEverything(t *testing.T, dir string) {
	t.Helper()
	showsAll(t, dir)
	for i := range 2000 {
		name := fmt.Sprintf("small/%d/%d", i%20, i)
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, content(name, 16<<10)) {
			t.Fatalf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// TestPrefetchAll: after --prefetch=all no registry is needed, every byte has come once, and the whole is verified, as
// when somebody had read it.
func TestPrefetchAll(t *testing.T) {
	for _, name := range []string{backend.FUSE, backend.FILE} {
		t.Run(name, func(t *testing.T) {
			im, other := served(t)
			_, size := other.layer(im.ref)
			im.ResetStats()
			s := newSession(t) // which has nothing of it
			dir := s.mount(im.ref, "--backend="+name, "--prefetch=all")
			st := s.prefetched(dir, backend.PrefetchDone)
			if st.Wanted != size || st.Fetched != size || st.Mode != "all" || st.Error != "" {
				t.Errorf("%+v of %d bytes", st, size)
			}
			stats := im.Stats()
			t.Logf("%d GETs of %d bytes", stats.BlobGETs, stats.BlobBytes)
			if stats.BlobBytes != size {
				t.Errorf("%d bytes came, of %d", stats.BlobBytes, size)
			}
			if most := int(size/(4<<20)) + 4; stats.BlobGETs > most {
				t.Errorf("%d GETs, at most %d are needed", stats.BlobGETs, most)
			}
			await(t, "the whole is verified", func() bool { return s.status(dir).By == "whole-blob" })
			im.Stop()
			showsEverything(t, dir)
		})
	}
}

// mountSaying mounts as mount does, and returns what is said about it: in the log, or before there was one.
func (s *session) mountSaying(ref string, flags ...string) (dir string, said func() string) {
	s.t.Helper()
	dir = s.target()
	r := s.run(binary, append(append([]string{"mount"}, flags...), ref, dir)...)
	if r.code != 0 {
		s.t.Fatalf("mount %q: %d, %s", flags, r.code, r.stderr)
	}
	s.t.Cleanup(func() {
		if mounted(s.t, dir) {
			s.must("umount", dir)
		}
	})
	return dir, func() string { return r.stderr + s.serverLog(dir) }
}

// TestPrefetchNone: nothing is fetched in the background unless somebody asks for it.
func TestPrefetchNone(t *testing.T) {
	im, s := served(t)
	dir := s.mount(im.ref, "--prefetch=none")
	if st := s.mountStatus(dir).Prefetch; st != nil {
		t.Errorf("%+v", st)
	}
	if stats := im.Stats(); stats.BlobBytes > 1<<20 {
		t.Errorf("%d bytes", stats.BlobBytes)
	}
}

// TestPrefetchCompressed: offsets are those of the image, whatever its blob is.
func TestPrefetchCompressed(t *testing.T) {
	for name, o := range map[string]verifiable.Options{
		"zstd": {Chunk: 64 << 10, Zstd: true}, "index": {Chunk: 64 << 10}, "tree": {Verity: true},
		"whole": {Zstd: true}, // which is here before it is mounted
	} {
		t.Run(name, func(t *testing.T) {
			im := serveVouched(t, o)
			s := newSession(t)
			dir := s.target()
			if r := s.run(binary, "mount", "--prefetch=all", im.ref, dir); r.code != 0 {
				t.Fatal(r.stderr)
			}
			s.prefetched(dir, backend.PrefetchDone)
			if st := s.status(dir); st.Fetched != st.Size || st.Verified != st.Size && st.By != "whole-blob" {
				t.Errorf("%+v", st)
			}
			im.Stop()
			if lies, failed := readFiles(t, dir); lies != 0 || failed != 0 {
				t.Errorf("%d lies, %d errors", lies, failed)
			}
			s.must("umount", dir)
		})
	}
}

// TestPrefetchProfile: a profile is replayed, what is side by side at once and nothing but that, up to the budget.
func TestPrefetchProfile(t *testing.T) {
	im, s := served(t)
	digest, size := s.layer(im.ref)
	absent := "sha256:" + strings.Repeat("ab", 32)
	file := filepath.Join(s.dir, "start.profile")
	write := func(size int64) {
		p, err := profile.New([]profile.Blob{
			{Digest: digest, Size: size, Reads: []profile.Read{
				{Order: 0, Off: 40 << 20, Len: 4096}, {Order: 1, Off: 40<<20 + chunk, Len: chunk}, {Order: 2, Off: 20<<20 + 100, Len: 10},
				{Order: 3, Off: 50 << 20, Len: 3 * chunk},
			}},
			{Digest: absent, Size: 100, Reads: []profile.Read{{Order: 0, Off: 0, Len: 100}}},
		})
		must(t, err)
		must(t, profile.WriteFile(file, p))
	}
	span := func(from, chunks int64) string { return fmt.Sprintf("bytes=%d-%d", from, from+chunks*chunk-1) }
	for _, c := range []struct {
		budget string
		state  backend.PrefetchState
		want   []string
		bytes  int64
	}{
		{"", backend.PrefetchDone, []string{span(40<<20, 2), span(20<<20, 1), span(50<<20, 3)}, 6 * chunk},
		{"1MiB", backend.PrefetchStopped, []string{span(40<<20, 2), span(20<<20, 1), span(50<<20, 1)}, 4 * chunk},
	} {
		write(size)
		s := newSession(t)
		im.ResetStats()
		flags := []string{"--prefetch=" + file}
		if c.budget != "" {
			flags = append(flags, "--prefetch-budget="+c.budget)
		}
		dir, said := s.mountSaying(im.ref, flags...)
		st := s.prefetched(dir, c.state)
		var got []string
		for _, r := range rangesOf(im.Registry) {
			if r != span(0, 1) { // the superblock
				got = append(got, r)
			}
		}
		if got, want := joined(t, got), joined(t, c.want); !slices.Equal(got, want) {
			t.Errorf("budget %q: %v, want %v", c.budget, got, want)
		}
		if st.Fetched != c.bytes || st.Mode != file {
			t.Errorf("budget %q: %+v", c.budget, st)
		}
		if log := said(); strings.Count(log, absent) != 1 || strings.Count(log, "\n") != 1 {
			t.Errorf("of the blob that is not there the log says %q", log)
		}
	}
	write(size + 1)
	dir, _ := s.mountSaying(im.ref, "--prefetch="+file)
	if st := s.prefetched(dir, backend.PrefetchStopped); !strings.Contains(st.Error, fmt.Sprint(size+1)) {
		t.Errorf("%+v", st)
	}
}

// joined sorts ranges, and joins those that touch: how long a piece is goes by how fast the ones before came.
func joined(t *testing.T, ranges []string) (list [][2]int64) {
	t.Helper()
	for _, r := range ranges {
		var from, to int64
		_, err := fmt.Sscanf(r, "bytes=%d-%d", &from, &to)
		must(t, err)
		list = append(list, [2]int64{from, to})
	}
	slices.SortFunc(list, func(a, b [2]int64) int { return cmp.Compare(a[0], b[0]) })
	apart := list[:0]
	for _, r := range list {
		if last := len(apart) - 1; last >= 0 && apart[last][1]+1 == r[0] {
			apart[last][1] = r[1]
		} else {
			apart = append(apart, r)
		}
	}
	return apart
}

// TestPrefetchNoRoom: what does not fit into the cache is not begun, what is in the budget is fetched and no more, and
// reads go on.
func TestPrefetchNoRoom(t *testing.T) {
	im, s := served(t)
	_, size := s.layer(im.ref)
	dir, said := s.mountSaying(im.ref, "--cache-size=8MiB", "--prefetch=all")
	st := s.prefetched(dir, backend.PrefetchStopped)
	if !strings.Contains(st.Error, fmt.Sprint(size)) || !strings.Contains(st.Error, fmt.Sprint(8<<20)) {
		t.Errorf("%+v", st)
	}
	if got := im.Stats().BlobBytes; got > 2<<20 {
		t.Errorf("%d bytes were fetched", got)
	}
	if log := said(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "--cache-size") {
		t.Errorf("the log is %q", log)
	}
	showsAll(t, dir)
	s.must("umount", dir)

	other := newSession(t)
	im.ResetStats()
	dir = other.mount(im.ref, "--cache-size=8MiB", "--prefetch=all", "--prefetch-budget=3MiB")
	st = other.prefetched(dir, backend.PrefetchStopped)
	if got := im.Stats().BlobBytes; got > 3<<20+chunk || got < 2<<20 || !strings.Contains(st.Error, "--prefetch-budget") {
		t.Errorf("%d bytes for a budget of 3 MiB: %+v", got, st)
	}
	showsAll(t, dir)
}

// TestPrefetchFullDisk: what came and was kept before the disk was full is counted, and is what the layer says is here.
func TestPrefetchFullDisk(t *testing.T) {
	im, s := served(t)
	disk := filepath.Join(s.dir, "disk")
	must(t, os.Mkdir(disk, 0o700))
	must(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=6m"))
	t.Cleanup(func() { must(t, unix.Unmount(disk, 0)) })
	dir, _ := s.mountSaying(im.ref, "--prefetch=all", "--cache-dir="+filepath.Join(disk, "cache"), "--cache-min-free=0", "--cache-size=1GiB")
	st := s.prefetched(dir, backend.PrefetchStopped)
	if here := s.status(dir).Fetched; st.Fetched != here || here < 1<<20 || st.Error == "" {
		t.Errorf("%d bytes are here: %+v", here, st)
	}
	s.must("umount", dir)
}

// TestPrefetchWrongWhole: what turns out to be wrong when all of it came is not said to be here.
func TestPrefetchWrongWhole(t *testing.T) {
	im, s := served(t)
	im.SetFault(fakeregistry.Always(fakeregistry.FlipBit(s.chunkOf(im.ref, bigFile, bigSize/2) * chunk)).OnBlobs())
	im.SetBandwidth(16 << 20) // so that the mount is there before all is
	dir := s.mount(im.ref, "--prefetch=all", "--log-level=info", "--cache-dir="+filepath.Join(s.dir, "of the wrong"))
	file := s.entry(dir).Log
	if st := s.prefetched(dir, backend.PrefetchStopped); !strings.Contains(st.Error, "is not what the manifest says") {
		t.Errorf("%+v", st)
	}
	log, err := os.ReadFile(file)
	if err != nil || strings.Contains(string(log), "is here") || strings.Count(string(log), "every read fails from now on") != 1 {
		t.Errorf("the log is %q, %v", log, err)
	}
	if r := s.run(binary, "umount", dir); r.code != 3 {
		t.Errorf("umount: %+v", r)
	}
}

// TestPrefetchInterrupted: a registry that goes away is waited for, and what it has not sent is fetched when it is back.
func TestPrefetchInterrupted(t *testing.T) {
	t.Parallel()
	im, s := served(t)
	_, size := s.layer(im.ref)
	im.ResetStats()
	im.SetBandwidth(16 << 20)
	dir := s.mount(im.ref, "--prefetch=all", "--on-error=wait:1s")
	await(t, "a part has come", func() bool { return im.Stats().BlobBytes > size/4 })
	im.Stop()
	st := s.prefetched(dir, backend.PrefetchWaiting)
	if st.Error == "" || st.Fetched >= size {
		t.Errorf("%+v", st)
	}
	im.SetBandwidth(0)
	must(t, im.Start())
	if st = s.prefetched(dir, backend.PrefetchDone); st.Fetched != size || st.Error != "" {
		t.Errorf("%+v", st)
	}
	if log := s.serverLog(dir); strings.Count(log, "tried again later") != 1 || strings.Count(log, "is here") != 1 {
		t.Errorf("the log is %q", log)
	}
	im.Stop()
	showsEverything(t, dir)
}

// TestPrefetchWrongBytes: what cannot be verified does not keep the rest from being fetched, and is fetched when it is
// right.
func TestPrefetchWrongBytes(t *testing.T) {
	im := serveVouched(t, verifiable.Options{Chunk: 64 << 10})
	s := newSession(t)
	bad := im.victimAt(t)
	im.SetFault(fakeregistry.Always(fakeregistry.FlipBit(bad)).OnBlobs())
	dir, _ := s.mountSaying(im.ref, "--prefetch=all") // it may come to it before the mount is there
	s.prefetched(dir, backend.PrefetchWaiting)
	st := s.status(dir)
	if st.Fetched >= st.Size {
		t.Errorf("%+v", st)
	}
	im.SetFault(nil)
	s.prefetched(dir, backend.PrefetchDone)
	im.Stop()
	if lies, failed := readFiles(t, dir); lies != 0 || failed != 0 {
		t.Errorf("%d lies, %d errors", lies, failed)
	}
}

// TestPrefetchUnmount: a mount that is fetching ends as soon as it is told to.
func TestPrefetchUnmount(t *testing.T) {
	for _, name := range []string{backend.FUSE, backend.FILE} {
		im, s := served(t)
		im.SetBandwidth(1 << 20)
		dir := s.mount(im.ref, "--backend="+name, "--prefetch=all")
		await(t, "it has begun", func() bool { return im.Stats().BlobBytes > 1<<20 })
		began := time.Now()
		s.must("umount", dir)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%s: unmounting took %v", name, took)
		}
		s.nothingLeft(dir)
		left := im.Stats().BlobBytes
		if _, size := s.layer(im.ref); left > size/2 {
			t.Errorf("%s: %d bytes came", name, left)
		}
	}
}

// TestPrefetchIsBehind: a read that somebody waits for does not wait for what is fetched in the background, by its own
// mount or by another one: until its answer is there, the link carries little more than without that.
func TestPrefetchIsBehind(t *testing.T) {
	// On a faster link a machine that is busy lets more pass than the round trips do.
	const latency, bandwidth = 20 * time.Millisecond, 4 << 20
	im, _ := served(t)
	other := pushRandom(t, im, 64<<20)
	im.SetLatency(latency)
	im.SetBandwidth(bandwidth)
	alone := carriedUntilAnswers(t, "alone", im, func(s *session) (string, string) { return s.mount(im.ref), "" })
	// What is on its way when the reader comes arrives: two round trips of it, and what two connections take that nobody
	// reads, which a kernel's buffers make 128 KiB each. If the three of them shared the link, it would carry twice the
	// answer more, and what it does in a round trip: 200 KB above this.
	most := alone + int64(2*latency.Seconds()*bandwidth) + 2*(128<<10)
	own := carriedUntilAnswers(t, "its own mount", im, func(s *session) (string, string) {
		dir := s.mount(im.ref, "--prefetch=all")
		return dir, dir
	})
	others := carriedUntilAnswers(t, "another mount", im, func(s *session) (string, string) {
		prefetching := s.mount(other, "--prefetch=all")
		return s.mount(im.ref), prefetching
	})
	if own > most || others > most {
		t.Errorf("%d bytes were carried until an answer, or %d; at most %d should be", own, others, most)
	}
}

// carriedUntilAnswers is how much the link carries until the answer to a read of a mount while the other one, or the
// same, fetches in the background: the lower quartile of several, for the machine may have others to serve, and the link
// goes on meanwhile.
func carriedUntilAnswers(t *testing.T, name string, im servedImage, mount func(*session) (dir, prefetching string)) int64 {
	var all []int64
	t.Run(name, func(t *testing.T) {
		s := newSession(t)
		dir, prefetching := mount(s)
		f, err := os.Open(filepath.Join(dir, bigFile))
		must(t, err)
		defer f.Close()
		_, err = f.Stat()
		must(t, err)
		for i := range 9 {
			before := im.Stats().BlobBytes
			shows(t, f, int64(bigSize-(2*i+1)<<20), "while all is fetched") // the file lies at the end
			all = append(all, im.Stats().BlobBytes-before)
		}
		if prefetching != "" {
			if st := s.mountStatus(prefetching).Prefetch; st.State != backend.PrefetchRunning {
				t.Fatalf("%+v", st)
			}
		}
		slices.Sort(all)
		t.Logf("%d bytes were carried until the answers", all)
	})
	if t.Failed() {
		t.FailNow()
	}
	return all[len(all)/4]
}

// pushRandom pushes an image of as many bytes that no other one has.
func pushRandom(t *testing.T, im servedImage, size int64) (ref string) {
	t.Helper()
	s, dir := newSession(t), t.TempDir()
	image, tree := filepath.Join(dir, "image.erofs"), filepath.Join(dir, "tree")
	must(t, os.Mkdir(tree, 0o755))
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{99}).Read(content) // it has always more
	must(t, os.WriteFile(filepath.Join(tree, "random"), content, 0o644))
	if r := s.run(binary, "build", "-o", image, tree); r.code != 0 {
		t.Fatal(r.stderr)
	}
	pushFile(t, im.URL(), "net/random:v1", image)
	return im.Addr() + "/net/random:v1"
}

// waitsFor is what docs/prefetch.md prints for who waits until the fetching in the background of the mount on dir ends.
func (s *session) waitsFor(ctx context.Context, dir string) *exec.Cmd {
	s.t.Helper()
	text, err := os.ReadFile("../../docs/prefetch.md")
	must(s.t, err)
	_, after, found := strings.Cut(string(text), "To wait for the end")
	if !found {
		s.t.Fatal("docs/prefetch.md does not say how to wait")
	}
	var script []string
	for line := range strings.Lines(after) {
		if code, ok := strings.CutPrefix(line, "      "); ok {
			script = append(script, code)
		} else if len(script) > 0 {
			break
		}
	}
	bin := s.t.TempDir()
	must(s.t, os.Symlink(binary, filepath.Join(bin, "erofs-oci")))
	return s.command(ctx, "sh", "-c", "PATH="+bin+":$PATH\n"+strings.ReplaceAll(strings.Join(script, ""), "DIR", dir))
}

// TestPrefetchWait: who waits as the documentation says waits for the mount that is meant, and not for ever for one that
// is dead or is not there; only of what was fetched it is said that it was.
func TestPrefetchWait(t *testing.T) {
	require.Has(t, "jq")
	im, s := served(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	slow := s.mount(im.ref, "--prefetch=all", "--prefetch-rate=1KiB", "--cache-dir="+filepath.Join(s.dir, "another cache"))
	waits := s.waitsFor(ctx, slow)
	must(t, waits.Start())
	ended := make(chan error, 1)
	go func() { ended <- waits.Wait() }()

	done := s.mount(im.ref, "--prefetch=all")
	stopped, _ := s.mountSaying(im.ref, "--prefetch=all", "--cache-size=8MiB", "--cache-dir="+filepath.Join(s.dir, "small"))
	for dir, code := range map[string]int{done: 0, stopped: 1, s.target(): 1} {
		cmd := s.waitsFor(ctx, dir)
		said, err := cmd.CombinedOutput()
		if ctx.Err() != nil || cmd.ProcessState.ExitCode() != code || len(said) > 0 {
			t.Errorf("exit code %d, want %d: %v, %q", cmd.ProcessState.ExitCode(), code, err, said)
		}
	}
	select {
	case err := <-ended:
		t.Fatalf("it did not wait: %v; %+v", err, s.mountStatus(slow).Prefetch)
	default:
	}
	s.end(slow, syscall.SIGKILL)
	if err := <-ended; err == nil || ctx.Err() != nil {
		t.Errorf("the server died: %v", err)
	}
	s.must("umount", slow)
}

// TestPrefetchRate: the rate is kept to.
func TestPrefetchRate(t *testing.T) {
	im, s := served(t)
	const rate, burst = 16 << 20, 4 << 20
	im.SetBandwidth(1 << 30) // so that what is not read is not sent
	began := time.Now()
	dir := s.mount(im.ref, "--prefetch=all", "--prefetch-rate=16MiB")
	await(t, "all is here", func() bool {
		st := s.mountStatus(dir).Prefetch
		came, most := im.Stats().BlobBytes, int64(time.Since(began).Seconds()*rate)+burst+2<<20 // what the mount reads itself
		if came > most {
			t.Errorf("%d bytes came within %v", came, time.Since(began))
		}
		return st.State == backend.PrefetchDone || t.Failed()
	})
	size := im.Stats().BlobBytes
	if took, least := time.Since(began), time.Duration(float64(size-burst-2<<20)/rate*float64(time.Second)); took < least || took > 4*least {
		t.Errorf("%d bytes took %v, at least %v are right", size, took, least)
	}
}

// TestPrefetchRecorded: what was recorded of a run is all that the run needs, and the walk for metadata is no part of it.
func TestPrefetchRecorded(t *testing.T) {
	im, s := served(t)
	file := filepath.Join(s.dir, "run.profile")
	run := func(dir string) {
		t.Helper()
		for _, name := range []string{"small/3/1003", deepFile, "small/19/39"} {
			if _, err := os.ReadFile(filepath.Join(dir, name)); err != nil {
				t.Error(err)
			}
		}
		f, err := os.Open(filepath.Join(dir, bigFile))
		must(t, err)
		shows(t, f, bigSize/2, "in the middle")
		must(t, f.Close())
	}
	dir := s.mount(im.ref, "--record="+file, "--prefetch=meta")
	s.prefetched(dir, backend.PrefetchDone)
	run(dir)
	s.must("umount", dir)
	recorded, err := profile.ReadFile(file)
	must(t, err)
	if len(recorded.Blobs) != 1 || recorded.Blobs[0].Bytes() > 8*chunk {
		t.Errorf("recorded: %+v", recorded)
	}

	other := newSession(t)
	dir = other.mount(im.ref, "--prefetch="+file)
	other.prefetched(dir, backend.PrefetchDone)
	im.Stop()
	run(dir)
}

// TestPrefetchMetaNoRoom: metadata that does not fit into the cache is fetched as far as it does, and listing goes on.
func TestPrefetchMetaNoRoom(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "go.erofs")
	im, s := served(t)
	if r := s.run(binary, "build", "-o", image, goTree(t)); r.code != 0 {
		t.Fatal(r.stderr)
	}
	pushFile(t, im.URL(), "net/tree:v1", image)
	dir, said := s.mountSaying(im.Addr()+"/net/tree:v1", "--cache-size=4MiB", "--prefetch=meta")
	st := s.prefetched(dir, backend.PrefetchStopped)
	if st.Error == "" || !strings.Contains(said(), "no room") {
		t.Errorf("%+v: %q", st, said())
	}
	if got := s.run("ls", "-lR", dir); got.code != 0 || got.stderr != "" || strings.Count(got.stdout, "\n") < 16_000 {
		t.Errorf("ls -lR: %d, %s", got.code, got.stderr)
	}
}
