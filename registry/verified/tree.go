package verified

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// TreePart is how much of a tree is fetched at once: the digests of 32 MiB of data, in
// blocks of 4096 and SHA-256. It is a multiple of every block size.
const TreePart = 256 << 10

// maxParts are remembered.
const maxParts = 64

// A Tree verifies blocks of a blob by its dm-verity tree. Together with its hook Verify it
// is the Fetcher of a cache: chunks that Verify found wrong it fetches from elsewhere.
type Tree struct {
	suspects
	verifier *integrity.Verifier
	parts    *parts
	size     int64       // of the data
	whole    atomic.Bool // the server sends the whole blob whatever it is asked for
	wrongLeaves
}

// TreeSize is how many bytes the tree has that root speaks of. There is an error where it
// cannot be, which OpenTree returns, too.
func TreeSize(root integrity.VerityRoot) (int64, error) {
	alg := integrity.SHA256
	if len(root.Digest) == integrity.SHA512.Size() {
		alg = integrity.SHA512
	}
	n, err := integrity.VeritySize(root.HashOffset, integrity.VerityOptions{Algorithm: alg, BlockSize: root.BlockSize})
	if err != nil {
		return 0, fmt.Errorf("dm-verity: %w: %w", err, integrity.ErrCorrupt)
	}
	if n > root.Size-root.HashOffset {
		return 0, fmt.Errorf("dm-verity: a tree of %d bytes at %d of a blob of %d: %w", n, root.HashOffset, root.Size, integrity.ErrCorrupt)
	}
	return n, nil
}

// OpenTree reads the beginning of the tree that root speaks of, with one GET, and
// verifies its root. More of it is read when it is needed.
func OpenTree(ctx context.Context, blob Fetcher, root integrity.VerityRoot) (*Tree, error) {
	n, err := TreeSize(root)
	if err != nil {
		return nil, err
	}
	t := &Tree{suspects: suspects{blob: blob, total: root.Size}, size: root.HashOffset, parts: newParts(blob, root.HashOffset, root.HashOffset+n)}
	for try := again(blob); ; try-- {
		if err = t.open(ctx, root); err == nil {
			return t, nil
		}
		wrong := isMismatch(err) || errors.Is(err, integrity.ErrCorrupt) || errors.Is(err, integrity.ErrUnsupported)
		if try == 0 || !wrong {
			return nil, fmt.Errorf("dm-verity tree: %w", err)
		}
		var m *integrity.MismatchError
		at := root.HashOffset
		if errors.As(err, &m) {
			at = m.Off
		}
		// The superblock is in the first part, and has the salt of all the others.
		t.parts.forget(root.HashOffset, err)
		t.parts.forget(at, err)
	}
}

// open reads the superblock, and the block that the root digest is of.
func (t *Tree) open(ctx context.Context, root integrity.VerityRoot) error {
	super := make([]byte, integrity.VeritySuperSize)
	if err := t.parts.read(ctx, super, root.HashOffset); err != nil {
		return err
	}
	v, err := integrity.OpenVerity(super, root)
	if err != nil {
		return err
	}
	t.verifier = v.NewVerifier(t.parts.read, integrity.VerifierOptions{})
	return t.verifier.VerifyRoot(ctx)
}

// Size is how many bytes of the blob the tree verifies: the first ones.
func (t *Tree) Size() int64 { return t.size }

// Fetch is a Fetcher's. What it is asked for of the tree, as by a cache that reads ahead, is
// not fetched twice. What Verify needs of the tree for these bytes is had before the body
// is, which keeps a connection until it is read: see Prepare. Where the whole blob comes,
// whatever is asked for, that is what all of it is verified by.
func (t *Tree) Fetch(ctx context.Context, off, n int64) (body io.ReadCloser, start, total int64, err error) {
	all := t.whole.Load()
	body, start, total, err = t.fetchPrepared(ctx, off, n, all)
	if err != nil || all || start == off || !t.further() {
		return body, start, total, err
	}
	t.whole.Store(true)
	if err := body.Close(); err != nil {
		return nil, 0, 0, err
	}
	return t.fetchPrepared(ctx, off, n, true)
}

// fetchPrepared is Fetch of what can be verified without the network: of all, or of what is
// asked for. In that case a body from the first byte has no more than that: if it went on,
// the rest could not be verified.
func (t *Tree) fetchPrepared(ctx context.Context, off, n int64, all bool) (body io.ReadCloser, start, total int64, err error) {
	from, size := off, n
	if all {
		from, size = 0, t.size
	}
	release, err := t.Prepare(ctx, from, size)
	if err != nil {
		return nil, 0, 0, err
	}
	body, start, total, err = t.fetchBefore(ctx, off, n, t.size, t.parts.end, func(at, n int64) io.Reader {
		return &partsReader{ctx: ctx, parts: t.parts, off: at, end: at + n}
	})
	if err != nil {
		release()
		return nil, 0, 0, err
	}
	if !all && off == 0 && start == 0 && t.further() {
		body = &first{ReadCloser: body, left: n, whole: &t.whole}
	}
	return &prepared{body, release}, start, total, nil
}

// further says that more of the tree than what OpenTree has read may be needed, and that
// there is room to remember all of it.
func (t *Tree) further() bool {
	n := t.parts.end - t.parts.off
	return n > TreePart && n <= maxParts*TreePart
}

// A first is the first left bytes of a body, which notes whether there are more.
type first struct {
	io.ReadCloser
	left  int64
	whole *atomic.Bool
}

func (f *first) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if int64(n) > f.left {
		f.whole.Store(true)
		n, err = int(f.left), nil
		if n == 0 {
			err = io.EOF
		}
	}
	f.left -= int64(n)
	return n, err
}

// A partsReader reads parts of the tree one after the other.
type partsReader struct {
	ctx      context.Context
	parts    *parts
	off, end int64
}

func (r *partsReader) Read(p []byte) (int, error) {
	if r.off == r.end {
		return 0, io.EOF
	}
	inPart := TreePart - (r.off-r.parts.off)%TreePart
	n := min(int64(len(p)), r.end-r.off, inPart)
	if err := r.parts.read(r.ctx, p[:n], r.off); err != nil {
		return 0, err
	}
	r.off += n
	return int(n), nil
}

// Verify is the hook of a cache, whose chunks are whole blocks. p is the cache's chunk at
// off. What of it is behind the data (the tree itself, for the most part) is not verified,
// and not to be given to anybody: see Size.
func (t *Tree) Verify(ctx context.Context, p []byte, off int64) error {
	if off >= t.size {
		return nil
	}
	data := p[:min(int64(len(p)), t.size-off)]
	if err := t.wrongLeaf(off, off+int64(len(data))); err != nil {
		return &WrongError{Err: err, Last: true}
	}
	for try := again(t.blob); ; try-- {
		err := t.verifier.Verify(ctx, data, off)
		if err == nil {
			return t.judge(off, int64(len(p)), nil)
		}
		var m *integrity.MismatchError
		switch {
		case !errors.As(err, &m) || m.Level == 0:
			return t.judge(off, int64(len(p)), err)
		case try == 0:
			return &WrongError{Err: err, Last: true}
		}
		t.parts.forget(m.Off, err)
	}
}

// Parts are those of a tree that were read, as they came: nothing in them is verified.
type parts struct {
	blob     Fetcher
	off, end int64

	mu     sync.Mutex // guards what follows
	parts  map[int64]*list.Element
	recent list.List       // of *part, the last used first
	wrong  map[int64]error // what was wrong with parts that are to be fetched again
}

// A part is fetched by who asks for it first.
type part struct {
	n    int64
	done chan struct{} // closed when there is data or err, which do not change after that
	data []byte
	err  error
}

func newParts(blob Fetcher, off, end int64) *parts {
	return &parts{blob: blob, off: off, end: end, parts: make(map[int64]*list.Element), wrong: make(map[int64]error)}
}

// read is an integrity.ReadFunc. A block does not lie across parts.
func (t *parts) read(ctx context.Context, p []byte, off int64) error {
	n := (off - t.off) / TreePart
	at := off - t.off - n*TreePart
	for {
		pt, mine, why := t.get(n)
		if mine {
			t.fetch(ctx, pt, why)
		}
		select {
		case <-pt.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		switch {
		case pt.err != nil && !mine && ctx.Err() == nil && (errors.Is(pt.err, context.Canceled) || errors.Is(pt.err, context.DeadlineExceeded)):
			continue // it was somebody else's haste
		case pt.err != nil:
			return pt.err
		case at < 0 || at+int64(len(p)) > int64(len(pt.data)):
			return fmt.Errorf("%d bytes at %d are not in one part of the tree", len(p), off)
		}
		copy(p, pt.data[at:])
		return nil
	}
}

// get is part n, and whether the caller has to fetch it; why says what was wrong with it
// the last time.
func (t *parts) get(n int64) (pt *part, mine bool, why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.parts[n]; e != nil {
		t.recent.MoveToFront(e)
		return e.Value.(*part), false, nil
	}
	pt = &part{n: n, done: make(chan struct{})}
	t.parts[n] = t.recent.PushFront(pt)
	if t.recent.Len() > maxParts {
		t.drop(t.recent.Back())
	}
	why = t.wrong[n]
	delete(t.wrong, n)
	return pt, true, why
}

// drop forgets a part; who waits for it still gets it. The caller holds mu.
func (t *parts) drop(e *list.Element) {
	t.recent.Remove(e)
	delete(t.parts, e.Value.(*part).n)
}

func (t *parts) fetch(ctx context.Context, pt *part, why error) {
	defer close(pt.done)
	off := t.off + pt.n*TreePart
	data := make([]byte, min(TreePart, t.end-off))
	if pt.err = fill(ctx, t.blob, data, off, why); pt.err == nil {
		pt.data = data
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.parts[pt.n]; e != nil && e.Value == pt {
		t.drop(e)
	}
}

// forget has the part that the byte at off is in fetched again.
func (t *parts) forget(off int64, why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := (off - t.off) / TreePart
	if e := t.parts[n]; e != nil {
		t.drop(e)
	}
	t.wrong[n] = why
}
