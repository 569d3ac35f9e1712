package verified_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry/verified"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// errBusy is what a line says of whom another one would have to wait for.
var errBusy = errors.New("the connection is in use")

// A line is the one connection to servers: it is free again when a body is closed.
type line struct {
	*servers
	t     *testing.T
	busy  chan struct{}
	waits bool // a Fetch waits for it; else that is an error
}

func oneLine(t *testing.T, s *servers, waits bool) *line {
	return &line{s, t, make(chan struct{}, 1), waits}
}

func (l *line) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return l.take(ctx, func() (io.ReadCloser, int64, int64, error) { return l.servers.Fetch(ctx, off, n) })
}

func (l *line) FetchElsewhere(ctx context.Context, off, n int64, why error) (io.ReadCloser, int64, int64, error) {
	return l.take(ctx, func() (io.ReadCloser, int64, int64, error) { return l.servers.FetchElsewhere(ctx, off, n, why) })
}

func (l *line) take(ctx context.Context, fetch func() (io.ReadCloser, int64, int64, error)) (io.ReadCloser, int64, int64, error) {
	select {
	case l.busy <- struct{}{}:
	default:
		if !l.waits {
			return nil, 0, 0, errBusy
		}
		select {
		case l.busy <- struct{}{}:
		case <-ctx.Done():
			return nil, 0, 0, ctx.Err()
		}
	}
	body, start, total, err := fetch()
	if err != nil {
		<-l.busy
		return nil, 0, 0, err
	}
	return &lineBody{body, l, atomic.Bool{}}, start, total, nil
}

type lineBody struct {
	io.ReadCloser
	line   *line
	closed atomic.Bool
}

func (b *lineBody) Close() error {
	if b.closed.Swap(true) {
		b.line.t.Error("a body is closed twice")
	} else {
		<-b.line.busy
	}
	return b.ReadCloser.Close()
}

// receive does what a cache does: it reads a body, and verifies each chunk before it closes
// it.
func receive(ctx context.Context, tree *verified.Tree, off, n, unit int64) error {
	body, _, _, err := tree.Fetch(ctx, off, n)
	if err != nil {
		return err
	}
	defer body.Close()
	var errs []error
	for end := off + n; off < end; off += unit {
		p := make([]byte, min(unit, end-off))
		if _, err := io.ReadFull(body, p); err != nil {
			return err
		}
		if err := tree.Verify(ctx, p, off); err != nil {
			errs = append(errs, fmt.Errorf("chunk at %d: %w", off, err))
		}
	}
	return errors.Join(errs...)
}

// TestOneConnection: who has the only connection does not wait for a part of the tree, which
// would need it.
func TestOneConnection(t *testing.T) {
	const unit, span = 256 << 10, 8 << 20
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	total := int64(len(b.Data))
	l := oneLine(t, serve(b.Data, nil), false)
	tree, err := verified.OpenTree(t.Context(), l, root(t, b))
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < total; off += span {
		if err := receive(t.Context(), tree, off, min(span, total-off), unit); err != nil {
			t.Errorf("at %d: %v", off, err)
		}
	}
	sent := int64(0)
	for _, r := range l.taken() {
		sent += r.n
	}
	if sent != total {
		t.Errorf("%d bytes were fetched of a blob of %d", sent, total)
	}
}

// TestOneConnectionWholeBodies: who has the only connection, by which the whole blob comes since the server knows no
// ranges, can verify all of it. A body that is not known to be that ends where it was asked to.
func TestOneConnectionWholeBodies(t *testing.T) {
	const unit, span = 256 << 10, 8 << 20
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	for _, offs := range [][]int64{{span}, {0, span}, {3 * span, 0}} {
		s := serve(b.Data, nil)
		s.whole = true
		tree, err := verified.OpenTree(t.Context(), oneLine(t, s, false), root(t, b))
		if err != nil {
			t.Fatal(err)
		}
		for k, off := range offs {
			body, start, _, err := tree.Fetch(t.Context(), off, span)
			if err != nil {
				t.Fatalf("%v: at %d: %v", offs, off, err)
			}
			want := int64(len(b.Data))
			if k == 0 && off == 0 {
				want = span
			}
			p, err := io.ReadAll(body)
			if err != nil || start != 0 || int64(len(p)) != want {
				t.Errorf("%v: at %d: %d bytes from %d, %v; want %d", offs, off, len(p), start, err, want)
			}
			for at := int64(0); at < int64(len(p)); at += unit {
				if err := tree.Verify(t.Context(), p[at:min(at+unit, int64(len(p)))], at); err != nil {
					t.Errorf("%v: at %d: %v", offs, at, err)
				}
			}
			if err := body.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestOneConnectionManyReaders: the same, with 16 who come at once and wait for each other.
func TestOneConnectionManyReaders(t *testing.T) {
	const unit = 256 << 10
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	l := oneLine(t, serve(b.Data, nil), true)
	tree, err := verified.OpenTree(t.Context(), l, root(t, b))
	if err != nil {
		t.Fatal(err)
	}
	l.taken()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // they would wait for ever
	defer cancel()
	var readers sync.WaitGroup
	for k := range int64(16) {
		readers.Go(func() {
			if err := receive(ctx, tree, 26<<20+k*3*unit, 3*unit, unit); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	if n := len(l.taken()); n != 17 {
		t.Errorf("%d requests, want one of each reader and one for the second part of the tree", n)
	}
}

// TestPrepareWrongLeaf: a leaf that stays wrong is in the way of its own data only, and is
// not fetched again while a body is open. The next reader tries again.
func TestPrepareWrongLeaf(t *testing.T) {
	const unit, perLeaf = 256 << 10, 128 * 4096
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	leaf := int64(len(b.Data)) - 4096 // the last one
	var good atomic.Bool
	s := serve(b.Data, func(_ int, off int64, _ int) bool { return off == leaf && !good.Load() })
	l := oneLine(t, s, false)
	tree, err := verified.OpenTree(t.Context(), l, root(t, b))
	if err != nil {
		t.Fatal(err)
	}
	l.taken()
	const off = treeSize - 3*perLeaf
	for _, c := range []struct {
		off, end int64
		wrong    bool
	}{{off, treeSize, true}, {off, treeSize - perLeaf, false}} {
		if err := receive(t.Context(), tree, c.off, c.end-c.off, unit); (err != nil) != c.wrong {
			t.Errorf("from %d to %d: %v", c.off, c.end, err)
		}
	}
	part := request{0, treeSize + 256<<10, int64(len(b.Data)) - treeSize - 256<<10}
	want := []request{part, part, {0, off, 3 * perLeaf}, {0, off, 2 * perLeaf}}
	if got := l.taken(); !slices.Equal(got, want) {
		t.Errorf("fetched %v, want %v", got, want)
	}
	body, _, _, err := tree.Fetch(t.Context(), treeSize-perLeaf, perLeaf)
	if err != nil {
		t.Fatal(err)
	}
	var w *verified.WrongError
	for n := range int64(2) {
		at := treeSize - perLeaf + n*unit
		if err := tree.Verify(t.Context(), b.Data[at:at+unit], at); !errors.As(err, &w) || w.Temporary() {
			t.Errorf("by the wrong leaf: %v", err)
		}
	}
	body.Close()
	good.Store(true)
	if err := receive(t.Context(), tree, off, 3*perLeaf, unit); err != nil {
		t.Errorf("when the leaf comes right: %v", err)
	}
}

// TestPrepareFails: what cannot be fetched fails before there is a body.
func TestPrepareFails(t *testing.T) {
	b := verifiable.Make(t, random(treeSize), verifiable.Options{Verity: true})
	l := oneLine(t, serve(b.Data, nil), false)
	tree, err := verified.OpenTree(t.Context(), l, root(t, b))
	if err != nil {
		t.Fatal(err)
	}
	l.busy <- struct{}{}
	if _, _, _, err := tree.Fetch(t.Context(), treeSize-4096, 4096); !errors.Is(err, errBusy) {
		t.Errorf("fetched: %v", err)
	}
	<-l.busy
	if err := receive(t.Context(), tree, treeSize-4096, 4096, 4096); err != nil {
		t.Error(err)
	}
	for _, r := range [][2]int64{{-1, 5}, {0, 0}, {5, -1}, {treeSize, 10}, {1 << 62, 1 << 62}} {
		release, err := tree.Prepare(t.Context(), r[0], r[1])
		if err != nil {
			t.Errorf("%v: %v", r, err)
			continue
		}
		release()
	}
	if release, err := tree.Prepare(t.Context(), 1, 1<<63-1); err != nil {
		t.Errorf("all from 1 on: %v", err)
	} else {
		release()
		release()
	}
}
