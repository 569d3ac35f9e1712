package blobcache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"
)

// A chunkFile is where chunks are kept: a file, as far as they need one. Tests put failing disks in its place.
type chunkFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Punch makes a hole. Whether it gives the space back is the file system's affair.
	Punch(off, n int64) error
	// Lost says why something that was written did not get to the disk. It is told once, and nothing is waited for;
	// behind is where there is no page of the file.
	Lost(behind int64) error
	// Drop has what is read after it come from the disk.
	Drop() error
}

// An osFile is a chunkFile of the operating system's.
type osFile struct{ *os.File }

func (f osFile) Punch(off, n int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// A disk is the open file of a blob. Who calls its methods has the locks that they need.
type disk struct {
	layout
	file   chunkFile
	handle *os.File // the same file, for its locks
	// nowhere says that the file is none of the directory's, since that had no room for it: nothing is written to it.
	nowhere bool
}

// errDamaged says that a chunk on disk is not what was written.
var errDamaged = errors.New("the cached chunk is damaged")

// load reads a chunk. It gives false where the chunk is absent, and errDamaged where it is not what it was.
func (d *disk) load(chunk int64, p []byte) (bool, error) {
	var e [entrySize]byte
	if _, err := d.file.ReadAt(e[:], d.entryAt(chunk)); err != nil {
		return false, fmt.Errorf("%w: %w", errDamaged, err)
	}
	sum, present := d.entry(e[:], chunk)
	if !present {
		return false, nil
	}
	if _, err := d.file.ReadAt(p, d.base+chunk*d.unit); err != nil {
		return false, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if d.sum(chunk, p) != sum {
		return false, errDamaged
	}
	return true, nil
}

// present gives the chunks of [first, end) whose entries are there.
func (d *disk) present(first, end int64) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		b := make([]byte, (end-first)*entrySize)
		if _, err := d.file.ReadAt(b, d.entryAt(first)); err != nil {
			return // who fetches them finds out whether they can be written
		}
		for c := first; c < end; c++ {
			if _, present := d.entry(b[(c-first)*entrySize:], c); present && !yield(c) {
				return
			}
		}
	}
}

// put writes a chunk and then its entry: in the page cache the data is there before the entry is. On the disk it may
// be the other way round, which the checksum tells.
func (d *disk) put(chunk int64, p []byte) error {
	if _, err := d.file.WriteAt(p, d.base+chunk*d.unit); err != nil {
		return err
	}
	var e [entrySize]byte
	d.putEntry(e[:], chunk, d.sum(chunk, p))
	_, err := d.file.WriteAt(e[:], d.entryAt(chunk))
	return err
}

// erase makes the chunks [first, end) absent.
func (d *disk) erase(first, end int64) error {
	_, err := d.file.WriteAt(make([]byte, (end-first)*entrySize), d.entryAt(first))
	return err
}

// punch gives back the space of the chunks [first, end), which are absent.
func (d *disk) punch(first, end int64) error {
	off := first * d.unit
	if err := d.file.Punch(d.base+off, min(end*d.unit, d.size)-off); err != nil {
		return fmt.Errorf("punch a hole: %w", err)
	}
	return nil
}

// data calls f with what the file has between two places, in order and in whole records, but for holes.
func (d *disk) data(from, to, record int64, f func(at int64, b []byte)) error {
	buf := make([]byte, min(64<<10, to-from))
	for at := from; at < to; {
		if to-from > int64(len(buf)) {
			next, err := unix.Seek(int(d.handle.Fd()), at, unix.SEEK_DATA)
			switch {
			case errors.Is(err, unix.ENXIO):
				return nil
			case err == nil && next > at:
				at = next - (next-from)%record
			}
		}
		if at >= to {
			return nil
		}
		n := min(int64(len(buf)), to-at)
		if _, err := d.file.ReadAt(buf[:n], at); err != nil {
			return err
		}
		f(at, buf[:n])
		at += n
	}
	return nil
}

// scan calls f for each chunk that is present, in order. It skips what is a hole in the entries.
func (d *disk) scan(f func(chunk int64)) error {
	err := d.data(headerSize, d.uses, entrySize, func(at int64, b []byte) {
		chunk := (at - headerSize) / entrySize
		for ; len(b) > 0; b, chunk = b[entrySize:], chunk+1 {
			if _, present := d.entry(b, chunk); present {
				f(chunk)
			}
		}
	})
	if err != nil {
		return fmt.Errorf("read entries of %s: %w", d.digest, err)
	}
	return nil
}

// filled are the regions in which there are chunks.
func (d *disk) filled() (regions []int64, err error) {
	err = d.scan(func(chunk int64) {
		if r := chunk / d.perRegion; len(regions) == 0 || regions[len(regions)-1] != r {
			regions = append(regions, r)
		}
	})
	return regions, err
}

// lastUses reads when each region was last used.
func (d *disk) lastUses() (useTable, error) {
	uses := newUseTable(d.regions)
	err := d.data(d.uses, d.uses+d.regions*useSize, useSize, func(at int64, b []byte) {
		region := (at - d.uses) / useSize
		for ; len(b) > 0; b, region = b[useSize:], region+1 {
			if when := int64(binary.LittleEndian.Uint64(b)); when != 0 {
				uses.set(region, when)
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("read the times of use of %s: %w", d.digest, err)
	}
	return uses, nil
}

func (d *disk) putUse(region, when int64) error {
	var b [useSize]byte
	binary.LittleEndian.PutUint64(b[:], uint64(when))
	_, err := d.file.WriteAt(b[:], d.uses+region*useSize)
	return err
}

// occupied is how much of the file system the file takes.
func (d *disk) occupied() (int64, error) { return occupied(d.handle) }

func occupied(f *os.File) (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	return st.Blocks * 512, nil // whatever the file system's blocks are
}

// removed says whether the file has no name any more: it was purged, or removed by hand.
func (d *disk) removed() bool {
	var st unix.Stat_t
	return !d.nowhere && unix.Fstat(int(d.handle.Fd()), &st) == nil && st.Nlink == 0
}

// sweep gives back the space of absent chunks: what was being written when a process was killed, or evicted.
func (d *disk) sweep(present bitmap, count int64) error {
	has, err := d.occupied()
	if err != nil || has <= count*d.unit+d.uses+d.regions*useSize+(1<<20) {
		return err
	}
	for first, end := int64(0), int64(0); first < d.chunks; first = end {
		if end = runEnd(present, first, d.chunks); present.has(first) {
			continue
		}
		if err := d.punch(first, end); err != nil {
			return err
		}
	}
	return nil
}

// lockRegion and lockChunk set a lock of another's file or of ours; unix.F_UNLCK removes it.
func (d *disk) lockRegion(kind int16, region int64) error {
	return lock(d.handle, kind, lockRegion+region)
}

func (d *disk) lockChunk(kind int16, chunk int64) error { return lock(d.handle, kind, lockChunk+chunk) }

func (d *disk) close() error { return d.file.Close() }
