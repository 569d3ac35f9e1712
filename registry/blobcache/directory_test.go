package blobcache

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// A slowDisk takes its time for each hole.
type slowDisk struct {
	chunkFile
	takes time.Duration
}

func (d slowDisk) Punch(off, n int64) error {
	time.Sleep(d.takes)
	return d.chunkFile.Punch(off, n)
}

// stock puts n blobs of a size into the directory of c.
func stock(t *testing.T, c *Cache, n, size int) {
	t.Helper()
	s := newServer(size)
	for i := range n {
		b, err := c.Open("sha256:"+fmt.Sprintf("%064x", i), int64(size), s, OpenOptions{})
		if err == nil {
			err = readNow(ctx, b, s, 0, b.Size())
		}
		if err == nil {
			err = b.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// While a process prunes many small blobs, for longer than anybody waits for the lock of the directory, others read and
// keep what they fetch, in their first grant and in others, prefetch, and open the cache. The number in "space" is right in
// the end.
func TestPruneBesideReaders(t *testing.T) {
	stage(t, func(t *testing.T) {
		const blobs, takes = 400, 50 * time.Millisecond // more than dirPatience
		const soon = workFor + takes + 10*time.Millisecond
		dir := t.TempDir() + "/cache"
		o := Options{ChunkSize: cs, Readahead: -1, MaxBytes: 8 << 20, MinFree: -1} // 256 KiB a grant
		admin, reader := openCacheAt(t, dir, o), openCacheAt(t, dir, o)
		admin.wrap = func(f chunkFile, _ layout) chunkFile { return slowDisk{f, takes} }
		stock(t, admin, blobs, cs)
		s := newServer(300 * cs)
		b := openBlob(t, reader, s)
		type result struct {
			freed int64
			err   error
		}
		pruned := make(chan result, 1)
		began := time.Now()
		go func() {
			freed, err := admin.Prune(0)
			pruned <- result{freed, err}
		}()
		time.Sleep(time.Second)
		for chunk := range int64(100) { // more than a grant
			before := time.Now()
			if err := readNow(ctx, b, s, chunk*cs, cs); err != nil {
				t.Error(err)
			}
			if took := time.Since(before); took > 2*soon {
				t.Errorf("chunk %d came after %v", chunk, took)
			}
		}
		if err := b.Prefetch(ctx, 100*cs, 100*cs); err != nil {
			t.Error(err)
		}
		before := time.Now()
		late := openCacheAt(t, dir, o)
		other := openBlob(t, late, s)
		if took := time.Since(before); took > 4*soon {
			t.Errorf("the cache and a blob were open after %v", took)
		}
		if err := readNow(ctx, other, s, 0, 300*cs); err != nil {
			t.Error(err)
		}
		select {
		case <-pruned:
			t.Fatal("pruned already: the test shows nothing")
		default:
		}
		r := <-pruned
		if took := time.Since(began); took < dirPatience {
			t.Errorf("pruned in %v: the test shows nothing", took)
		}
		if r.err != nil || r.freed < blobs*cs {
			t.Errorf("%d bytes given back, %v, want %d and more", r.freed, r.err, blobs*cs)
		}
		s.checkOnce(t)
		mustHave(t, b, s, chunks(0, 200))
		mustHave(t, other, s, chunks(0, 300))
		if st, ot := b.Stats(), other.Stats(); st.Unkept != 0 || ot.Unkept != 0 {
			t.Errorf("%d and %d chunks were not kept", st.Unkept, ot.Unkept)
		}
		if names, err := admin.names(); err != nil || len(names) != 1 {
			t.Errorf("%d blobs are left, %v; want the one that is in use", len(names), err)
		}
		used, ok := admin.space.read()
		if took := taken(dir); !ok || used < took || used > took+2*usualGrant {
			t.Errorf("the number is %d, %v; %d bytes are taken", used, ok, took)
		}
	})
}

// Two processes make room at the same time, one of them slowly: both keep what they fetch, and what one has given back the
// other one does not give back once more.
func TestEvictBesideReaders(t *testing.T) {
	stage(t, func(t *testing.T) {
		const limit, takes = 8 << 20, 50 * time.Millisecond
		dir := t.TempDir() + "/cache"
		full := openCacheAt(t, dir, Options{ChunkSize: cs, Readahead: -1, MaxBytes: -1, MinFree: -1})
		stock(t, full, 40, 64*cs) // 10 MiB
		if err := full.Close(); err != nil {
			t.Fatal(err)
		}
		o := Options{ChunkSize: cs, Readahead: -1, MaxBytes: limit, MinFree: -1}
		slow, quick := openCacheAt(t, dir, o), openCacheAt(t, dir, o)
		slow.wrap = func(f chunkFile, _ layout) chunkFile { return slowDisk{f, takes} }
		s := newServer(200 * cs)
		b, other := openBlob(t, slow, s), openBlob(t, quick, s)
		first := read(ctx, b, s, 0, cs)
		time.Sleep(2 * workFor)
		mustWait(t, "who makes room slowly", first)
		if err := readNow(ctx, other, s, 100*cs, 100*cs); err != nil {
			t.Error(err)
		}
		mustWait(t, "who makes room slowly", first)
		if err := <-first.done; err != nil {
			t.Error(err)
		}
		if err := readNow(ctx, b, s, cs, 99*cs); err != nil {
			t.Error(err)
		}
		s.checkOnce(t)
		mustHave(t, b, s, chunks(0, 100))
		mustHave(t, other, s, chunks(100, 200))
		// There are 2 MiB too many, and half a MiB may have been granted to the other one: each alone would evict ten blobs
		// for that, and one or two for his grant.
		if st, ot := slow.Stats(), quick.Stats(); st.Evictions < 1 || ot.Evictions < 8 || st.Evictions+ot.Evictions > 18 {
			t.Errorf("%d and %d evictions, want one and eight at least, and 18 at most", st.Evictions, ot.Evictions)
		}
		if took := taken(dir); took > limit+usualGrant {
			t.Errorf("%d bytes are taken, of %d", took, limit)
		}
	})
}

// A region that is read after it was found to be the next to go stays.
func TestReadMeanwhileStays(t *testing.T) {
	stage(t, func(t *testing.T) {
		const region = regionSize / cs // chunks
		const slow = lookEvery / 10    // all of it is over before the disk is looked at: who waits for a mutex stops the clock
		c := openCache(t, Options{ChunkSize: cs, Readahead: -1})
		c.wrap = func(f chunkFile, _ layout) chunkFile { return slowDisk{f, slow} }
		s := newServer(3 * regionSize)
		b := openBlob(t, c, s)
		for r := range int64(3) {
			c.clock.Store(time.Now().UnixMicro() + r)
			if err := readNow(ctx, b, s, r*regionSize, cs); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait() // so do flights that have not ended
		done := make(chan struct{})
		go func() {
			defer close(done)
			evictAll(t, c, 2*cs)
		}()
		time.Sleep(slow / 2) // the first is being evicted
		c.clock.Add(10)
		if !b.ReadResident(make([]byte, 10), regionSize) {
			t.Error("the second is not resident")
		}
		<-done
		mustHave(t, b, s, []int64{region})
	})
}

// Another process has the lock of the directory. Who wants to keep something asks again every second or so, and after some
// time in vain every minute, and waits for the lock a second each time; once it can be had, what is fetched is kept.
func TestLockedDirectory(t *testing.T) {
	for _, test := range []struct {
		held time.Duration
		vain int64 // reads that waited for the lock in vain
		kept time.Duration
	}{
		{500 * time.Millisecond, 0, 0},
		{1500 * time.Millisecond, 1, 2 * time.Second}, // in vain until 1 s, refused until 2 s
		{5500 * time.Millisecond, 3, 6 * time.Second}, // in vain until 1, 3 and 5 s
		{20 * time.Second, 5, 69 * time.Second},       // in vain until 1, 3, 5, 7 and 9 s, then refused for a minute
	} {
		t.Run(test.held.String(), func(t *testing.T) {
			stage(t, func(t *testing.T) {
				dir := t.TempDir() + "/cache"
				o := Options{ChunkSize: cs, Readahead: -1}
				holder, c := openCacheAt(t, dir, o), openCacheAt(t, dir, o)
				s := newServer(800 * cs)
				b := openBlob(t, c, s)
				held, done := make(chan struct{}), make(chan error, 1)
				began := time.Now()
				go func() {
					done <- holder.space.locked(ctx, func() error { close(held); time.Sleep(test.held); return nil })
				}()
				<-held
				waited := int64(0)
				for chunk := int64(0); ; chunk++ {
					before := time.Now()
					if err := readNow(ctx, b, s, chunk*cs, cs); err != nil {
						t.Fatal(err)
					}
					took := time.Since(before)
					if took > grantPatience+10*time.Millisecond {
						t.Errorf("chunk %d came after %v", chunk, took)
					}
					if b.Stats().ChunksPresent > 0 {
						break
					}
					if took > 0 {
						waited++
					}
					time.Sleep(100 * time.Millisecond)
				}
				if took := time.Since(began); took < test.kept || took > max(test.kept, test.held)+200*time.Millisecond {
					t.Errorf("kept after %v, want %v", took, test.kept)
				}
				if waited != test.vain {
					t.Errorf("%d reads waited for the lock in vain, want %d", waited, test.vain)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
