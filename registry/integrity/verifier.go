package integrity

import (
	"bytes"
	"container/list"
	"context"
	"fmt"
	"sync"
)

// ReadFunc fills all of p from byte off of data and tree, or returns an error. It may be
// called by many at a time.
type ReadFunc func(ctx context.Context, p []byte, off int64) error

// VerifierOptions are those of a Verifier.
type VerifierOptions struct {
	// CacheBytes is how many bytes of verified hash blocks are remembered. 0 stands for
	// 4 MiB, which is those of 512 MiB of data, in blocks of 4096 and SHA-256.
	CacheBytes int64
}

// A Verifier verifies data blocks, and reads what it needs of the tree. It remembers hash
// blocks only once they are verified up to the root digest. It may be used by many at a
// time; two who need the same hash block at the same moment both read it.
type Verifier struct {
	tree *Verity
	read ReadFunc
	max  int // hash blocks that are remembered

	mu     sync.Mutex
	blocks map[int64]*list.Element // guarded by mu; by offset, of *hashBlock
	recent list.List               // guarded by mu; of *hashBlock, the last used first
	pinned int                     // guarded by mu; how many of them have pins
}

// A hashBlock has been verified. Its data does not change.
type hashBlock struct {
	off  int64
	data []byte
	pins int // who want it remembered; guarded by Verifier.mu
}

// NewVerifier makes a verifier that reads hash blocks by read.
func (v *Verity) NewVerifier(read ReadFunc, o VerifierOptions) *Verifier {
	if o.CacheBytes == 0 {
		o.CacheBytes = 4 << 20
	}
	// Without room for a path from leaf to root, each read would begin at the root.
	n := max(o.CacheBytes/int64(v.block), int64(len(v.levels)))
	return &Verifier{tree: v, read: read, max: int(n), blocks: make(map[int64]*list.Element)}
}

// Verify returns nil if p, which is whole blocks of the data from byte off on, is what
// the root digest was made of. It returns a *MismatchError if that is not so, or if a
// hash block above it was changed, and wraps the error of the read function. Once its hash
// blocks are remembered, it does not allocate unless it fails.
func (r *Verifier) Verify(ctx context.Context, p []byte, off int64) error {
	v, size := r.tree, int64(r.tree.block)
	if off < 0 || off%size != 0 || len(p)%v.block != 0 || off > v.dataSize()-int64(len(p)) {
		return fmt.Errorf("integrity: %d bytes at %d are not whole blocks of %d within the %d bytes that dm-verity covers", len(p), off, size, v.dataSize())
	}
	var leaf []byte // the hash block that has the digest of block n, unless n begins another
	for n := off / size; len(p) > 0; n++ {
		if leaf == nil || n%v.fanout == 0 {
			var err error
			if leaf, err = r.digests(ctx, 0, n/v.fanout); err != nil {
				return err
			}
		}
		if err := v.check(p[:size], leaf, 0, n); err != nil {
			return err
		}
		p = p[size:]
	}
	return nil
}

// VerifyRoot reads the hash block that the root digest is of, and verifies it. A superblock
// whose salt or algorithm was forged fails here. A tree over a single block has no hash
// block: there all is left to Verify.
func (r *Verifier) VerifyRoot(ctx context.Context) error {
	if len(r.tree.levels) == 0 {
		return nil
	}
	_, err := r.digests(ctx, len(r.tree.levels)-1, 0)
	return err
}

// Pin reads and verifies the hash block that has the digest of the data block at off, and
// what is above it, and has it remembered until unpin is called, once: until then Verify
// reads nothing for the data from off up to end. The memory is the caller's to bound, beside
// CacheBytes. Its errors are those of Verify; then there is nothing to unpin, but end is
// said nevertheless where off lies in the data.
func (r *Verifier) Pin(ctx context.Context, off int64) (end int64, unpin func(), err error) {
	v, size := r.tree, int64(r.tree.block)
	if off < 0 || off >= v.dataSize() {
		return off, nil, fmt.Errorf("integrity: byte %d is not of the %d bytes that dm-verity covers", off, v.dataSize())
	}
	if len(v.levels) == 0 {
		return v.dataSize(), func() {}, nil
	}
	n := off / size / v.fanout
	end = min((n+1)*v.fanout*size, v.dataSize())
	data, err := r.digests(ctx, 0, n)
	if err != nil {
		return end, nil, err
	}
	at := v.levels[0].off + n*size
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.blocks[at]
	if e == nil { // forgotten since
		e = r.recent.PushFront(&hashBlock{off: at, data: data})
		r.blocks[at] = e
	}
	b := e.Value.(*hashBlock)
	if b.pins++; b.pins == 1 {
		r.pinned++
	}
	r.trim()
	return end, func() { r.unpin(b) }, nil
}

func (r *Verifier) unpin(b *hashBlock) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.pins--; b.pins == 0 {
		r.pinned--
		r.trim()
	}
}

// digests is block n of the level, verified. What is above the highest level is the root
// digest.
func (r *Verifier) digests(ctx context.Context, level int, n int64) ([]byte, error) {
	v := r.tree
	if level == len(v.levels) {
		return v.root, nil
	}
	off := v.levels[level].off + n*int64(v.block)
	if data := r.remembered(off); data != nil {
		return data, nil
	}
	parent, err := r.digests(ctx, level+1, n/v.fanout)
	if err != nil {
		return nil, err
	}
	data := make([]byte, v.block)
	if err := r.read(ctx, data, off); err != nil {
		return nil, fmt.Errorf("integrity: dm-verity hash block at %d: %w", off, err)
	}
	if err := v.check(data, parent, level+1, n); err != nil {
		return nil, err
	}
	r.remember(off, data)
	return data, nil
}

// check compares block n of a level, 0 being the data, with its digest among those of
// the hash block above it.
func (v *Verity) check(block, parent []byte, level int, n int64) error {
	at := int(n%v.fanout) * v.digest
	want := parent[at : at+v.digest]
	got := v.hash.sum(block)
	if bytes.Equal(got[:v.digest], want) {
		return nil
	}
	e := &MismatchError{What: "data block", Index: n, Level: level, Off: n * int64(v.block), Len: int64(v.block),
		Algorithm: v.hash.alg, Want: bytes.Clone(want), Got: bytes.Clone(got[:v.digest])}
	if level > 0 {
		e.What = "hash block"
		e.Off += v.levels[level-1].off
	}
	return e
}

func (r *Verifier) remembered(off int64) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.blocks[off]
	if e == nil {
		return nil
	}
	r.recent.MoveToFront(e)
	return e.Value.(*hashBlock).data
}

// remember keeps a block that was verified. Readers may still hold one that is forgotten.
func (r *Verifier) remember(off int64, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.blocks[off] != nil {
		return // another reader was as quick
	}
	r.blocks[off] = r.recent.PushFront(&hashBlock{off: off, data: data})
	r.trim()
}

// trim forgets what was not used for longest, but for what is pinned. The caller holds mu.
func (r *Verifier) trim() {
	for e := r.recent.Back(); e != nil && r.recent.Len() > r.max+r.pinned; {
		b, before := e.Value.(*hashBlock), e.Prev()
		if b.pins == 0 {
			r.recent.Remove(e)
			delete(r.blocks, b.off)
		}
		e = before
	}
}
