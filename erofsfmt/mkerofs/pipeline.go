package mkerofs

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"
	"slices"
	"sync"
	"time"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// maxWorkers bounds the memory of a build: each has two segments and what they become.
const maxWorkers = 8

// stored is where a file's content is before the image is laid out.
type stored struct {
	index          // of what is encoded
	plain    bool  // it is not: neither index nor extents
	blocks   int64 // in spool.data, from index.block on
	tailAt   int64 // in spool.tails, index.tail bytes
	checksum uint32
}

// A pipeline compresses the regular files of an image:
//
//	          segments                encoded
//	read big ──────────▶ workers ──────────────▶ collect ──▶ spools
//	 files    in order    read small, encode      in order      │
//	                         ▲                                  │
//	                         └──── segments of the packed inode ┘
//
// What comes out depends on the order of the files alone.
type pipeline struct {
	*Builder
	ctx     context.Context
	work    chan *segment
	ordered chan *segment // the same, but those of the packed inode; its room bounds how far reading is ahead
	spools  *spools
	seen    map[[32]byte]*stored // by content, where that is asked for
	packed  packedInode
}

// spools are what is written behind the metadata, when that is there.
type spools struct {
	data   *spool // blocks of files
	packed *spool // blocks of the packed inode
	tails  *spool // of both
}

func (b *Builder) newSpools() (s *spools, err error) {
	s = &spools{}
	for _, p := range []**spool{&s.data, &s.packed, &s.tails} {
		if *p, err = b.newSpool(); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

func (s *spools) Close() error {
	if s == nil {
		return nil
	}
	return errors.Join(s.data.Close(), s.packed.Close(), s.tails.Close())
}

// workers is how many goroutines work side by side.
func (b *Builder) workers() int {
	if b.options.Workers > 0 {
		return b.options.Workers
	}
	return min(runtime.GOMAXPROCS(0), maxWorkers)
}

// compress reads all files and leaves what they become in spools.
func (b *Builder) compress(ctx context.Context, files []*node) (_ *spools, err error) {
	s, err := b.newSpools()
	if err != nil {
		return nil, err
	}
	if b.options.Compression.Fragments {
		b.packed = newPackedNode()
	}
	ctx, cancel := context.WithCancel(ctx)
	workers := b.workers()
	p := &pipeline{
		Builder: b, ctx: ctx, spools: s, seen: make(map[[32]byte]*stored),
		work: make(chan *segment), ordered: make(chan *segment, 2*workers),
	}
	var wait sync.WaitGroup
	defer func() {
		cancel()
		for range p.ordered { // lets the reader end
		}
		close(p.work)
		wait.Wait()
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	var readErr error
	wait.Go(func() {
		defer close(p.ordered)
		readErr = p.read(files)
	})
	for range workers {
		w, err := b.newWorker()
		if err != nil {
			return nil, err
		}
		wait.Go(func() {
			for s := range p.work {
				if s.err = ctx.Err(); s.err == nil {
					s.err = w.do(s)
				}
				close(s.done)
			}
		})
	}
	for s := range p.ordered {
		if err := p.collect(s); err != nil {
			return nil, err
		}
	}
	if readErr != nil { // p.ordered is closed after it was set
		return nil, readErr
	}
	if err := p.finishPacked(); err != nil {
		return nil, err
	}
	return s, s.tails.w.Flush()
}

// send gives a segment to the workers.
func (p *pipeline) send(s *segment) error {
	s.done = make(chan struct{})
	select {
	case p.work <- s:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// read makes segments of the files.
func (p *pipeline) read(files []*node) error {
	for _, n := range files {
		if n.Size > maxSegment {
			if err := p.readBig(n); err != nil {
				return fmt.Errorf("%q, a file of %d bytes: %w", n.Path, n.Size, err)
			}
			continue
		}
		if err := p.queue(&segment{n: n, size: int(n.Size), first: true, last: true}); err != nil {
			return err
		}
	}
	return nil
}

func (p *pipeline) queue(s *segment) error {
	if err := p.send(s); err != nil {
		return err
	}
	select {
	case p.ordered <- s:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

func (p *pipeline) readBig(n *node) (err error) {
	r, err := n.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	checksum := uint32(0)
	for off := int64(0); off < n.Size; off += maxSegment {
		size := int(min(maxSegment, n.Size-off))
		s := &segment{n: n, size: size, first: off == 0, last: n.Size-off <= maxSegment, data: p.buffers.get(size)}
		if err := readSome(r, s.data, off); err != nil {
			return err
		}
		checksum = crc32.Update(checksum, castagnoli, s.data)
		s.checksum = checksum
		if s.last {
			if err := expectEnd(r); err != nil {
				return err
			}
		}
		if err := p.queue(s); err != nil {
			return err
		}
	}
	return nil
}

// collect puts what a segment became where it belongs. Segments come in the order of the files.
func (p *pipeline) collect(s *segment) error {
	<-s.done
	if s.err != nil {
		return s.err
	}
	p.progress.add(s.size)
	if s.last {
		p.progress.file()
	}
	st := s.n.stored
	if s.first {
		st = p.place(s)
		if st == nil {
			return nil // another file has the same content
		}
	}
	if err := p.append(p.spools.data, st, s); err != nil {
		return err
	}
	if s.fragment == nil {
		return nil
	}
	st.fragment, st.fragOff = true, p.packed.size
	err := p.addFragment(s.fragment)
	p.buffers.put(s.fragment)
	return err
}

// place begins the file of s, unless its content is there already.
func (p *pipeline) place(s *segment) *stored {
	if p.options.Compression.Dedupe && s.whole() {
		if same := p.seen[s.digest]; same != nil {
			s.n.stored = same
			p.buffers.put(s.blocks)
			return nil
		}
	}
	st := p.newStored(s.n.Size, p.spools.data)
	s.n.stored = st
	if p.options.Compression.Dedupe && s.whole() {
		p.seen[s.digest] = st
	}
	return st
}

func (p *pipeline) newStored(size int64, in *spool) *stored {
	return &stored{index: index{
		Compression: &p.options.Compression, blockBits: p.blockBits, size: size, block: uint32(in.size >> p.blockBits),
	}}
}

// append adds the next segment of a file to a spool.
func (p *pipeline) append(to *spool, st *stored, s *segment) error {
	st.extents = append(st.extents, s.extents...)
	st.blocks += int64(len(s.blocks) >> p.blockBits)
	st.checksum = s.checksum
	st.plain = s.plain
	if s.last && len(s.tail) > 0 {
		st.tailAt, st.tail = p.spools.tails.size, int64(len(s.tail))
		if _, err := p.spools.tails.Write(s.tail); err != nil {
			return err
		}
	}
	// A file of which nothing was encoded is stored exactly as a plain one is.
	if s.last && !s.whole() && s.fragment == nil && st.tail == 0 && !slices.ContainsFunc(st.extents, func(e extent) bool { return e.encoded }) {
		st.plain, st.extents = true, nil
	}
	_, err := to.Write(s.blocks)
	p.buffers.put(s.blocks)
	return err
}

// The packedInode is a file made of what other files leave to it.
type packedInode struct {
	size   int64
	data   []byte     // the last bytes of it, which are no segment yet
	begun  int        // segments
	queued []*segment // that workers have
	stored *stored
}

// addFragment appends to the packed inode.
func (p *pipeline) addFragment(data []byte) error {
	p.packed.size += int64(len(data))
	for len(data) > 0 {
		if p.packed.data == nil {
			p.packed.data = p.buffers.get(maxSegment)[:0]
		}
		n := copy(p.packed.data[len(p.packed.data):maxSegment], data)
		p.packed.data = p.packed.data[:len(p.packed.data)+n]
		data = data[n:]
		// The last segment is not known before the end: a full one waits for the byte behind it.
		if len(data) > 0 {
			if err := p.sendPacked(false); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pipeline) sendPacked(last bool) error {
	s := &segment{n: p.Builder.packed, data: p.packed.data, first: p.packed.begun == 0, last: last}
	p.packed.data = nil
	p.packed.begun++
	if err := p.send(s); err != nil {
		return err
	}
	p.packed.queued = append(p.packed.queued, s)
	return p.collectPacked(2)
}

// collectPacked waits for segments of the packed inode until workers have most of them at most.
func (p *pipeline) collectPacked(most int) error {
	for len(p.packed.queued) > most {
		s := p.packed.queued[0]
		p.packed.queued = p.packed.queued[1:]
		<-s.done
		if s.err != nil {
			return s.err
		}
		if p.packed.stored == nil {
			p.packed.stored = p.newStored(0, p.spools.packed)
		}
		if err := p.append(p.spools.packed, p.packed.stored, s); err != nil {
			return err
		}
	}
	return nil
}

// finishPacked ends the packed inode, if there is one.
func (p *pipeline) finishPacked() error {
	if p.packed.size == 0 {
		p.Builder.packed = nil
		return nil
	}
	if err := p.sendPacked(true); err != nil {
		return err
	}
	if err := p.collectPacked(0); err != nil {
		return err
	}
	n := p.Builder.packed
	n.Size, n.nlink = p.packed.size, 1
	n.stored = p.packed.stored
	n.stored.size = n.Size
	// Its blocks lie behind those of all others.
	n.stored.block += uint32(p.spools.data.size >> p.blockBits)
	return nil
}

func newPackedNode() *node {
	return &node{Entry: Entry{Mode: ModeRegular, Mtime: time.Unix(0, 0)}}
}
