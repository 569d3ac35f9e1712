package erofsfmt

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
)

// CheckOptions are how an image is checked. The zero value works.
type CheckOptions struct {
	Options

	// MaxFaults is where Check gives up; 0 means 1000.
	MaxFaults int

	// Progress, if it is not nil, is told from time to time how far the check is.
	Progress func(CheckStats)
}

const defaultMaxFaults = 1000

// A Fault is one thing that is wrong with an image.
type Fault struct {
	Off  int64  // the byte where it is; -1 if that is not known
	In   string // what Off is a byte of, if it is not the image: "metabox", "packed inode", "device 1"
	Nid  Nid    // the inode that it is a fault of, where Path is not empty
	Path string // from the root; or "packed inode", "metabox"; or "": it is the image's
	What string
}

// String is one line, whatever names the image has.
func (f Fault) String() string {
	s := ""
	if f.Off >= 0 {
		s = fmt.Sprintf("byte %d", f.Off)
		if f.In != "" {
			s += " of the " + f.In
		}
		s += ": "
	}
	if f.Path != "" {
		s += fmt.Sprintf("nid %d %q: ", uint64(f.Nid), f.Path)
	}
	return s + f.What
}

// CheckStats count what was checked.
type CheckStats struct {
	Inodes    int64 // that were found
	Announced int64 // inodes, by the superblock
	Bytes     int64 // in files, with holes
	Faults    int
	Checksum  bool // the superblock has one
	Stopped   bool // by MaxFaults; there may be more faults
}

// Check looks at everything in the image in src: it walks the tree, reads and
// decodes all data, and calls report for whatever breaks a rule of the format
// or would make a part of the image unreachable. It calls report in the
// caller's goroutine and in the same order each time, and goes on after a fault
// as far as it can. The error is that of the source, or of an image that cannot
// be opened for another reason than a fault; it says nothing about faults.
//
// Memory does not grow with the data: there is a bit for each inode and each 32
// bytes of metadata, a byte for each block, and a few for each directory and
// each file with several names that is not done with. Two things are taken on
// trust: that blocks which begin and end as an extent known already are that
// extent, and that pclusters which share a block, as only those of extent
// records may, share no byte.
func Check(ctx context.Context, src ReaderAt, o CheckOptions, report func(Fault)) (CheckStats, error) {
	limit := o.MaxFaults
	if limit <= 0 {
		limit = defaultMaxFaults
	}
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &checker{
		ctx: ctx, o: o, src: src,
		batch: newBatch(),
		order: make(chan *checkBatch, 4*runtime.GOMAXPROCS(0)),
		work:  make(chan *checkBatch, 4*runtime.GOMAXPROCS(0)),
	}
	for range runtime.GOMAXPROCS(0) {
		running.Go(c.verifyBatches)
	}
	running.Go(c.run)
	var stats CheckStats
	for b := range c.order {
		<-b.done
		faults := stats.Faults
		stats = b.stats
		stats.Faults = faults
		for _, it := range b.items {
			if it.fault == nil {
				continue
			}
			if stats.Faults == limit {
				stats.Stopped = true
				return stats, nil
			}
			stats.Faults++
			report(*it.fault)
		}
		if b.err != nil {
			return stats, b.err
		}
		if o.Progress != nil {
			o.Progress(stats)
		}
	}
	if ctx.Err() != nil {
		return stats, context.Cause(ctx)
	}
	return stats, nil
}

// A checker walks an image in one goroutine, run, which alone knows what was
// seen. What takes time, reading and decoding, it leaves to others, in batches:
//
//	run ──┬── work ──▶ verifyBatches, one a processor
//	      └── order ─▶ Check, which waits for each batch and reports its faults
type checker struct {
	ctx context.Context
	o   CheckOptions
	src ReaderAt

	im    *Image
	stats CheckStats
	meta  metaReader
	seen  metaMap    // the inodes that were found
	taken metaMap    // the slots that inodes take, with what follows them
	space []blockMap // of each source

	links     linkMap        // names that are still to be found
	linkPaths map[Nid]string // of the first of these, unless there are too many
	dirs      []*dirNode     // to be walked
	noPacked  bool           // the packed inode is faulty
	hidden    bool           // a fault kept parts of the tree from being seen

	batch *checkBatch
	order chan *checkBatch
	work  chan *checkBatch
}

// A checkBatch is some faults that were found and some extents that may have
// more, in the order in which they are to be reported.
type checkBatch struct {
	items []checkItem
	bytes int64 // to be read or decoded
	stats CheckStats
	err   error // not the image's: it ends the check
	done  chan struct{}
}

type checkItem struct {
	fault  *Fault
	who    *owner
	extent extent // to be verified, unless there is a fault already
}

// What a batch has at most, about.
const (
	batchItems = 256
	batchBytes = 4 << 20
)

func newBatch() *checkBatch { return &checkBatch{done: make(chan struct{})} }

// add puts an item into the batch.
func (c *checker) add(it checkItem) {
	c.batch.items = append(c.batch.items, it)
	c.batch.bytes += it.extent.llen
	if len(c.batch.items) >= batchItems || c.batch.bytes >= batchBytes {
		c.flush()
	}
}

// flush hands the batch on.
func (c *checker) flush() {
	b := c.batch
	b.stats = c.stats
	c.batch = newBatch()
	for _, to := range []chan *checkBatch{c.work, c.order} {
		select {
		case to <- b:
		case <-c.ctx.Done():
			return
		}
	}
}

// fault notes a fault of an inode, or, where who is nil, of the image.
func (c *checker) fault(who *owner, at place, format string, args ...any) {
	f := Fault{Off: at.off, In: at.in(), What: fmt.Sprintf(format, args...)}
	who.own(&f)
	c.add(checkItem{fault: &f})
}

// failed notes an error: a fault, or the end of the check. at is where to say
// that it is, if the error does not know.
func (c *checker) failed(who *owner, at place, err error) {
	f, fatal := faultOf(who, err)
	if fatal != nil {
		c.batch.err = errors.Join(c.batch.err, fatal)
		c.flush()
		return
	}
	if f.Off < 0 {
		f.Off, f.In = at.off, at.in()
	}
	c.add(checkItem{fault: f})
}

// faultOf makes a fault of an error of the image. Any other error is fatal.
func faultOf(who *owner, err error) (f *Fault, fatal error) {
	var fe *FormatError
	if !errors.As(err, &fe) {
		return nil, err
	}
	f = &Fault{Off: fe.Off, In: fe.In, What: fe.What}
	if fe.Err == ErrUnsupported || fe.Err == ErrNotErofs {
		f.What += ": " + fe.Err.Error()
	}
	who.own(f)
	return f, nil
}

// verifyBatches reads and decodes what the batches want verified.
func (c *checker) verifyBatches() {
	v := verifier{ctx: c.ctx}
	for b := range c.work {
		v.im = c.im // which run has set
		for items := b.items; len(items) > 0 && b.err == nil; {
			n := 1
			if items[0].fault == nil {
				n, b.err = v.verify(items)
			}
			items = items[n:]
		}
		close(b.done)
	}
}

// A verifier reads and decodes extents. It has the memory that this takes.
type verifier struct {
	ctx     context.Context
	im      *Image
	in, out []byte
}

// verifyPiece is how much is read at once.
const verifyPiece = 1 << 20

// verify verifies the first item, and those after it that lie side by side with it
// on the source, of which it returns the number. The error is not the image's.
func (v *verifier) verify(items []checkItem) (n int, fatal error) {
	first := &items[0].extent
	if first.kind == stored {
		return 1, items[0].found(v.readAll(first))
	}
	size := int64(0)
	for _, it := range items {
		if it.fault != nil || it.extent.kind != encoded || it.extent.at != first.at.plus(size) || n > 0 && size+it.extent.plen > verifyPiece {
			break
		}
		size += it.extent.plen
		n++
	}
	v.in = sized(v.in, size)
	if err := v.im.readPlace(v.ctx, v.in, first.at); err != nil {
		return 1, items[0].found(err)
	}
	in := v.in
	for i := range items[:n] {
		e := &items[i].extent
		v.out = sized(v.out, e.llen)
		if err := items[i].found(v.im.decode(e, in[:e.plen], v.out)); err != nil {
			return n, err
		}
		in = in[e.plen:]
	}
	return n, nil
}

// readAll reads an extent that is stored as it is.
func (v *verifier) readAll(e *extent) error {
	v.in = sized(v.in, min(e.llen, verifyPiece))
	for done := int64(0); done < e.llen; done += verifyPiece {
		if err := v.ctx.Err(); err != nil {
			return context.Cause(v.ctx)
		}
		if err := v.im.readPlace(v.ctx, v.in[:min(verifyPiece, e.llen-done)], e.at.plus(done)); err != nil {
			return err
		}
	}
	return nil
}

// found makes a fault of an error, if it is one; else it is returned.
func (it *checkItem) found(err error) (fatal error) {
	if err == nil {
		return nil
	}
	it.fault, fatal = faultOf(it.who, err)
	return fatal
}

// sized is b, or a larger one, with n bytes.
func sized(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		return make([]byte, n)
	}
	return b[:n]
}
