package verified

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// Prepare reads and verifies what of the tree the data from off to off+n is verified by, and
// has it remembered until release is called: until then Verify of that data waits for
// nothing. Who holds what others need to bring a part of the tree (a connection, of which
// there may be one; a permit to read from a disk) calls it before, lest all of them hold
// one and wait for a part. It costs one hash block for each 512 KiB, in blocks of 4096 and
// SHA-256.
//
// A hash block that stays wrong is no error of Prepare, since it is in the way of its own
// data only: Verify says so, without fetching it once more.
func (t *Tree) Prepare(ctx context.Context, off, n int64) (release func(), err error) {
	if off < 0 || n <= 0 || off >= t.size {
		return func() {}, nil // there is nothing to verify
	}
	h := &holding{tree: t}
	end := off + min(n, t.size-off)
	for off < end {
		if off, err = h.leaf(ctx, off); err != nil {
			h.release()
			return nil, fmt.Errorf("dm-verity tree: %w", err)
		}
	}
	return sync.OnceFunc(h.release), nil
}

// A holding is what a Prepare has remembered.
type holding struct {
	tree  *Tree
	unpin []func()
	wrong []*wrongLeaf
}

// leaf has the leaf remembered that verifies the block at off, or what is wrong with it, and
// says where the data of the next one begins.
func (h *holding) leaf(ctx context.Context, off int64) (next int64, err error) {
	t := h.tree
	for try := again(t.blob); ; try-- {
		next, unpin, err := t.verifier.Pin(ctx, off)
		var m *integrity.MismatchError
		switch {
		case err == nil:
			h.unpin = append(h.unpin, unpin)
			t.acquit(next)
			return next, nil
		case !errors.As(err, &m):
			return 0, err
		case try == 0:
			h.wrong = append(h.wrong, t.convict(off, next, err))
			return next, nil
		}
		t.parts.forget(m.Off, err)
	}
}

func (h *holding) release() {
	for _, unpin := range h.unpin {
		unpin()
	}
	for _, w := range h.wrong {
		h.tree.pardon(w)
	}
}

// A wrongLeaf is a hash block that stayed wrong, for who has prepared for the data from off
// to end.
type wrongLeaf struct {
	off, end int64
	err      error
}

// wrongLeaves are those that somebody has prepared for. There are few, and usually none.
type wrongLeaves struct {
	leaves sync.Mutex              // guards what follows
	is     map[*wrongLeaf]struct{} // nil until there is one
}

func (l *wrongLeaves) convict(off, end int64, err error) *wrongLeaf {
	l.leaves.Lock()
	defer l.leaves.Unlock()
	if l.is == nil {
		l.is = make(map[*wrongLeaf]struct{})
	}
	w := &wrongLeaf{off, end, err}
	l.is[w] = struct{}{}
	return w
}

// acquit says that the leaf whose data ends at end came right.
func (l *wrongLeaves) acquit(end int64) {
	l.leaves.Lock()
	defer l.leaves.Unlock()
	for w := range l.is {
		if w.end == end {
			delete(l.is, w)
		}
	}
}

// pardon has the leaf tried again by who needs it next.
func (l *wrongLeaves) pardon(w *wrongLeaf) {
	l.leaves.Lock()
	defer l.leaves.Unlock()
	delete(l.is, w)
}

// wrongLeaf says what is wrong with a leaf of the data from off to end.
func (l *wrongLeaves) wrongLeaf(off, end int64) error {
	l.leaves.Lock()
	defer l.leaves.Unlock()
	for w := range l.is {
		if w.off < end && w.end > off {
			return w.err
		}
	}
	return nil
}

// prepared is a body whose bytes can be verified until it is closed.
type prepared struct {
	io.ReadCloser
	release func()
}

func (p *prepared) Close() error {
	defer p.release()
	return p.ReadCloser.Close()
}
