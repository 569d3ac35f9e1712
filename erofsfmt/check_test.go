package erofsfmt

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// checkAll checks an image and returns its faults.
func checkAll(t testing.TB, data []byte, o CheckOptions) ([]Fault, CheckStats) {
	t.Helper()
	var faults []Fault
	stats, err := Check(context.Background(), memory(data), o, func(f Fault) { faults = append(faults, f) })
	if err != nil {
		t.Fatal(err)
	}
	return faults, stats
}

// Nothing is wrong with any image of the corpus.
func TestCheckCorpus(t *testing.T) {
	for _, c := range corpus.Images(t) {
		t.Run(c.Name, func(t *testing.T) {
			var o CheckOptions
			if c.Blob != nil {
				o.Devices = []ReaderAt{memory(c.Blob)}
			}
			progress := CheckStats{}
			o.Progress = func(s CheckStats) { progress = s }
			faults, stats := checkAll(t, c.Data, o)
			for _, f := range faults {
				t.Error(f)
			}
			want := CheckStats{Inodes: 269, Bytes: 676504, Checksum: c.Name != "nosbcrc"}
			sb := openCorpus(t, c).Super()
			for _, bit := range []uint32{ondisk.IncompatFragments, ondisk.IncompatMetabox} {
				if sb.incompat(bit) && (bit == ondisk.IncompatMetabox || sb.PackedNid != 0) {
					want.Inodes++
				}
			}
			want.Announced = want.Inodes
			if stats != want || progress != want {
				t.Errorf("%+v, at last %+v, want %+v", stats, progress, want)
			}
		})
	}
}

// Nothing is wrong with the data of what no mkfs writes. The directory of a fake is
// not what a builder would make of it.
func TestCheckHandmade(t *testing.T) {
	for _, h := range handmadeImages(t) {
		var o CheckOptions
		for _, d := range h.devices {
			o.Devices = append(o.Devices, memory(d))
		}
		stats, err := Check(context.Background(), h.fake.image(t), o, func(f Fault) {
			if !strings.Contains(f.What, "file type 1") && !strings.Contains(f.What, "superblock counts 0") && !strings.HasPrefix(f.What, "link count ") {
				t.Errorf("%s: %v", h.name, f)
			}
		})
		if err != nil || stats.Inodes < 2 {
			t.Errorf("%s: %+v, %v", h.name, stats, err)
		}
	}
}

// A wrong checksum is a fault, and the rest is checked none the less.
func TestCheckChecksum(t *testing.T) {
	p := newPatient(t, "plain")
	at, _ := p.inode("mixed/half")
	p.put(at+inodeNlink, uint32(2))
	p.sign()
	p.data[ondisk.SuperOffset+ondisk.ChecksumOffset] ^= 1
	faults, stats := checkAll(t, p.data, CheckOptions{})
	if len(faults) != 2 || !strings.HasPrefix(faults[0].String(), "byte 1024: superblock checksum 0x") ||
		!strings.Contains(faults[1].What, "link count 2") {
		t.Errorf("%v", faults)
	}
	if !stats.Checksum || stats.Inodes != 269 {
		t.Errorf("%+v", stats)
	}
}

// The number of faults is limited, and they come in the same order each time.
func TestCheckLimitAndOrder(t *testing.T) {
	p := newPatient(t, "zstd")
	for _, e := range readDir(t, p.im, p.find("bigdir")) {
		if !strings.HasPrefix(e.Name, ".") {
			at, _ := p.inode("bigdir/" + e.Name)
			p.put(at+inodeNlink, uint32(9))
		}
	}
	for e := p.extent("mixed/half", 0); e.end() < 154000; e = p.extent("mixed/half", e.end()) { // and what is decoded
		p.data[e.at.off+e.plen-1] ^= 0xff
	}
	p.sign()
	all, stats := checkAll(t, p.data, CheckOptions{})
	if len(all) < 100 || stats.Faults != len(all) || stats.Stopped {
		t.Fatalf("%d faults, %+v", len(all), stats)
	}
	for range 5 {
		if again, _ := checkAll(t, p.data, CheckOptions{}); !slices.Equal(again, all) {
			t.Fatal("the faults are others the next time")
		}
	}
	some, stats := checkAll(t, p.data, CheckOptions{MaxFaults: 10})
	if !slices.Equal(some, all[:10]) || stats.Faults != 10 || !stats.Stopped {
		t.Errorf("%d faults, %+v", len(some), stats)
	}
	if some, stats = checkAll(t, p.data, CheckOptions{MaxFaults: len(all)}); len(some) != len(all) || stats.Stopped {
		t.Errorf("%d faults, %+v", len(some), stats)
	}
}

// failing is a source that has trouble past some byte.
type failing struct {
	memory
	from int64
	err  error
}

func (f failing) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off+int64(len(p)) > f.from {
		return f.err
	}
	return f.memory.ReadAt(ctx, p, off)
}

// What the source cannot read is no fault of the image, and neither is a check
// that was called off.
func TestCheckErrors(t *testing.T) {
	im := corpus.Get(t, "lz4")
	trouble := errors.New("trouble")
	nothing := func(f Fault) { t.Errorf("a fault: %v", f) }
	for _, from := range []int64{0, 20000, int64(len(im.Data)) - 5000} {
		if _, err := Check(context.Background(), failing{im.Data, from, trouble}, CheckOptions{}, nothing); !errors.Is(err, trouble) {
			t.Errorf("from byte %d: %v", from, err)
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(trouble)
	if _, err := Check(ctx, memory(im.Data), CheckOptions{}, nothing); !errors.Is(err, trouble) {
		t.Errorf("called off: %v", err)
	}
	if _, err := Check(context.Background(), memory(pattern(8192, 1)), CheckOptions{}, nothing); !errors.Is(err, ErrNotErofs) {
		t.Errorf("no image: %v", err)
	}
}

// survive checks an image that may be hostile.
func survive(t testing.TB, data []byte) (faults int) {
	stats, err := Check(context.Background(), memory(data), CheckOptions{MaxFaults: 50, Options: Options{CacheBytes: 4 << 20}}, func(f Fault) {
		if s := f.String(); f.What == "" || strings.ContainsRune(s, '\n') || len(s) > 8000 {
			t.Fatalf("not a line: %q", s)
		}
	})
	if err != nil && !errors.Is(err, ErrNotErofs) {
		t.Fatal(err)
	}
	return stats.Faults
}

// Mutations of every image of the corpus are reported on; none is a panic, takes
// long or leaves much memory behind.
func TestCheckMutations(t *testing.T) {
	perImage := 12
	if testing.Short() {
		perImage = 3
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	total, found := 0, 0
	for i, c := range corpus.Images(t) {
		rnd := rand.New(rand.NewPCG(3, uint64(i)))
		for n := range perImage {
			data := mutate(bytes.Clone(c.Data), rnd)
			began := time.Now()
			if survive(t, data) > 0 {
				found++
			}
			if d := time.Since(began); d > 10*time.Second {
				t.Errorf("%s, mutation %d took %v", c.Name, n, d)
			}
			total++
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
		t.Errorf("%d bytes more after %d images", grown, total)
	}
	t.Logf("%d of %d", found, total)
	if found < total/2 {
		t.Errorf("only %d of %d mutations were noticed", found, total)
	}
}

func FuzzCheck(f *testing.F) {
	for _, b := range tinyImages(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > ondisk.SuperOffset+12 {
			data[ondisk.SuperOffset+8] &^= ondisk.CompatSbChksum // the fuzzer cannot compute it
		}
		survive(t, data)
	})
}
