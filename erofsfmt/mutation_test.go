package erofsfmt

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/internal/ondisk"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
)

// Mutations of every image of the corpus, the same ones each time. Each image is
// opened, walked and read; nothing panics, hangs or takes much memory, and every
// error is one that the package promises.
func TestMutations(t *testing.T) {
	random, aimed := 6, 2
	images := corpus.Images(t)
	if testing.Short() {
		images = slices.DeleteFunc(slices.Clone(images), func(c corpus.Image) bool { return !slices.Contains(shortFS, c.Name) })
	}
	peak := watchMemory(t)
	total, failed := 0, 0
	for i, c := range images {
		rnd := rand.New(rand.NewPCG(3, uint64(i)))
		attempt := func(what string, data []byte) {
			began := cpuTime(t)
			errs := probe(t, data, 100, 1<<19)
			if d := cpuTime(t) - began; d > 20*time.Second {
				t.Errorf("%s, %s: took %v", c.Name, what, d)
			}
			if total++; errs > 0 {
				failed++
			}
		}
		for range random {
			attempt("random", mutate(bytes.Clone(c.Data), rnd))
		}
		inodes := inodesOf(t, c)
		changes := aims()
		for _, what := range slices.Sorted(maps.Keys(changes)) {
			for range aimed {
				data := bytes.Clone(c.Data)
				data[ondisk.SuperOffset+8] &^= ondisk.CompatSbChksum
				changes[what](victim{data, inodes[rnd.IntN(len(inodes))], inodes}, rnd)
				attempt(what, data)
			}
		}
	}
	if failed < total/4 {
		t.Errorf("only %d of %d mutations were noticed", failed, total)
	}
	// What the prober has the image remember, and 64 MiB. (The race detector, which
	// comes with -short, has its own.)
	if most := int64(64<<20 + probeCache); peak() > most && !testing.Short() {
		t.Errorf("%d bytes more than before, at the most, after %d images", peak(), total)
	}
	t.Logf("%d images, %d with errors, %d MiB at the most", total, failed, peak()>>20)
}

// cpuTime is what this process has had, which does not depend on its neighbours.
func cpuTime(t *testing.T) time.Duration {
	var use unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
		t.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

// watchMemory returns a function that says how much the process has grown since,
// at its largest.
func watchMemory(t *testing.T) func() int64 {
	if _, err := os.Stat("/proc/self/clear_refs"); err != nil {
		t.Logf("memory is not watched: %v", err)
		return func() int64 { return 0 }
	}
	before := debug.SetGCPercent(20) // so that it is what is held that counts, not what could be freed
	t.Cleanup(func() { debug.SetGCPercent(before) })
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // the peak from here on
		t.Fatal(err)
	}
	read := func() (hwm int64) {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		if _, err := fmt.Sscan(rest, &hwm); err != nil {
			t.Fatal(err)
		}
		return hwm << 10
	}
	start := read()
	return func() int64 { return read() - start }
}

// An at is where an inode is in an image, and what kind it is.
type at struct {
	off    int
	layout uint8
	dir    bool
	body   int // behind the inode and its xattrs
}

// inodesOf are the inodes that lie in the image itself.
func inodesOf(t *testing.T, c corpus.Image) []at {
	var all []at
	im := openCorpus(t, c)
	visit(t, im, func(_ string, ino *Inode) {
		if where := im.locate(ino.Nid); where.src == 0 {
			all = append(all, at{int(where.off), ino.layout, ino.IsDir(), int(im.bodyAt(ino, 8).off)})
		}
	})
	if len(all) == 0 { // in the metabox, the inode of which is there
		all = append(all, at{off: int(im.locate(im.sb.MetaboxNid).off)})
	}
	return all
}

// A victim is an image, one of its inodes, and all of them.
type victim struct {
	data []byte
	at
	all []at
}

func (v victim) put32(off int, n uint32) {
	if off >= 0 && off+4 <= len(v.data) {
		binary.LittleEndian.PutUint32(v.data[off:], n)
	}
}

// aims are mutations of what is known to be there.
func aims() map[string]func(v victim, rnd *rand.Rand) {
	giant := []uint32{0x7fffffff, 0x80000000, 0xffffffff, 0xfffffff0, 1 << 24}
	pick := func(rnd *rand.Rand) uint32 { return giant[rnd.IntN(len(giant))] }
	return map[string]func(v victim, rnd *rand.Rand){
		"swapped fields": func(v victim, rnd *rand.Rand) {
			i, j := v.off+4*rnd.IntN(8), v.off+4*rnd.IntN(8)
			a, b := binary.LittleEndian.Uint32(v.data[i:]), binary.LittleEndian.Uint32(v.data[j:])
			v.put32(i, b)
			v.put32(j, a)
		},
		"a giant size": func(v victim, rnd *rand.Rand) { v.put32(v.off+8, pick(rnd)) },
		"giant sizes of extended inodes": func(v victim, rnd *rand.Rand) {
			v.data[v.off] |= ondisk.FormatExtended
			v.put32(v.off+8, pick(rnd))
			v.put32(v.off+12, pick(rnd)&0x7fffffff)
		},
		"many xattrs": func(v victim, rnd *rand.Rand) {
			binary.LittleEndian.PutUint16(v.data[v.off+2:], uint16(pick(rnd)))
		},
		"giant counts of the superblock": func(v victim, rnd *rand.Rand) {
			v.put32(ondisk.SuperOffset+[]int{0x24, 0x28, 0x2c, 0x54, 0x58, 0x5c, 0x60, 0x64, 0x80, 0x84}[rnd.IntN(10)], pick(rnd))
		},
		"another layout": func(v victim, rnd *rand.Rand) {
			v.data[v.off] = v.data[v.off]&^(ondisk.FormatLayoutMask<<1) | byte(rnd.IntN(6))<<1
		},
		"another kind of file": func(v victim, rnd *rand.Rand) { v.data[v.off+5] = byte(rnd.Uint32()) },
		"a loop of directories": func(v victim, rnd *rand.Rand) {
			// An entry of a directory that is inline leads to some inode, or to the root.
			if v.dir && v.layout == ondisk.LayoutInline {
				v.put32(v.body&^7+ondisk.DirentSize*rnd.IntN(4), uint32(v.all[rnd.IntN(len(v.all))].off/32))
			}
			v.put32(v.body, uint32(v.off/32))
		},
		"an extent in the inode": func(v victim, rnd *rand.Rand) {
			v.put32(v.off+16, uint32(v.off>>12)) // what a plain file's is
			for i := range 4 {                   // and entries of an index
				v.put32(v.body+16+8*i+4, uint32(v.off>>12))
			}
		},
		"an index of anything": func(v victim, rnd *rand.Rand) {
			for i := v.body; i < min(v.body+128, len(v.data)); i++ {
				v.data[i] = byte(rnd.Uint32())
			}
		},
		"an advise of anything": func(v victim, rnd *rand.Rand) { v.put32(v.body+4, rnd.Uint32()) },
		"special inodes that are others": func(v victim, rnd *rand.Rand) {
			// The packed inode, the metabox and the root: the same, or each other.
			off := ondisk.SuperOffset + []int{0x0e, 0x60, 0x70, 0x80}[rnd.IntN(4)]
			binary.LittleEndian.PutUint16(v.data[off:], uint16(v.off/32))
		},
		"zeros from somewhere on": func(v victim, rnd *rand.Rand) { clear(v.data[rnd.IntN(len(v.data)):]) },
	}
}

// mutate changes metadata more often than data: that is where the traps are.
func mutate(b []byte, rnd *rand.Rand) []byte {
	b[ondisk.SuperOffset+8] &^= ondisk.CompatSbChksum
	spot := func() int {
		if rnd.IntN(4) == 0 {
			return rnd.IntN(len(b))
		}
		return ondisk.SuperOffset + rnd.IntN(min(len(b), 64<<10)-ondisk.SuperOffset)
	}
	for range 1 + rnd.IntN(24) {
		i := spot()
		switch rnd.IntN(6) {
		case 0, 1:
			b[i] ^= 1 << rnd.IntN(8)
		case 2:
			b[i] = []byte{0, 1, 0x7f, 0x80, 0xff}[rnd.IntN(5)]
		case 3:
			fill := byte(0xff * rnd.IntN(2))
			for j := i; j < min(i+8, len(b)); j++ {
				b[j] = fill
			}
		case 4:
			copy(b[i:min(i+64, len(b))], b[spot():])
		case 5:
			if rnd.IntN(8) == 0 {
				b = b[:max(ondisk.SuperOffset+ondisk.SuperSize, i)]
			}
		}
	}
	return b
}

// Numbers that a hostile image would like to be believed.
func TestGiantClaims(t *testing.T) {
	for name, edit := range map[string]func(*fake){
		"chunks of 2^47 bytes": func(f *fake) { f.inode.Format, f.inode.U = 1|4<<1, ondisk.ChunkIndexes|31 },
		"a block map of 2^60":  func(f *fake) { f.inode.Format, f.inode.U = 1|4<<1, 0 },
		"inline of 2^62":       func(f *fake) { f.inode.Format = 1 | 2<<1 },
		"a full index":         func(f *fake) { f.inode.Format = 1 | 1<<1 },
		"a compact index":      func(f *fake) { f.inode.Format, f.body = 1|3<<1, mapHeader(compact, 0, 1, 0, 0) },
		"records of 4 bytes":   func(f *fake) { f.inode.Format, f.body = 1|1<<1, mapHeader(full, 0, 1, 0, 0) },
		"2^48 records": func(f *fake) {
			f.inode.Format, f.body = 1|1<<1, mapHeader(full, 0xffffffff, 1|2<<1, 0xff, 0x7f)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(ondisk.LayoutPlain, 1<<62)
			f.super.FeatureIncompat = ondisk.IncompatLz4ZeroPadding
			edit(f)
			im, ino := f.open(t, Options{})
			for _, off := range []int64{0, 1 << 40, 1<<62 - 4096} {
				p := &prober{t: t, im: im}
				p.check(im.ReadFile(context.Background(), ino, make([]byte, 4096), off))
			}
		})
	}
}
