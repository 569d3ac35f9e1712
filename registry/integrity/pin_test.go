package integrity

import (
	"context"
	"errors"
	"slices"
	"testing"
)

// What is pinned is remembered beside CacheBytes, until nobody pins it any longer.
func TestPin(t *testing.T) {
	const block = 512 // 16 digests each: 17 leaves, two blocks above them, the top
	f := newTree(t, random(257*block, 1), VerityOptions{BlockSize: block})
	src := &reader{blob: f.blob}
	// Room for three blocks, one of each level.
	r := f.open(t).NewVerifier(src.read, VerifierOptions{CacheBytes: 1})
	verify := func(n int64) []int64 {
		t.Helper()
		if err := r.Verify(context.Background(), f.blob[n*block:(n+1)*block], n*block); err != nil {
			t.Fatal(err)
		}
		return src.took()
	}
	var unpins []func()
	for _, c := range []struct{ off, end int64 }{
		{0, 16}, {5*block + 7, 16}, {16 * block, 32}, {256 * block, 257},
	} {
		end, unpin, err := r.Pin(context.Background(), c.off)
		if err != nil || end != c.end*block {
			t.Fatalf("byte %d: up to %d, %v; want %d", c.off, end, err, c.end*block)
		}
		unpins = append(unpins, unpin)
	}
	src.took()
	for n := range int64(10) { // others come and go
		verify(32 + 16*n)
	}
	for _, n := range []int64{0, 15, 16, 31, 256} {
		if got := verify(n); len(got) != 0 {
			t.Errorf("block %d is pinned, and %v was read", n, got)
		}
	}
	if len(r.blocks) != 3+3 || r.recent.Len() != 3+3 {
		t.Errorf("%d blocks are remembered, want 3 and 3 that are pinned", len(r.blocks))
	}
	unpins[0]()
	for n := range int64(10) {
		verify(32 + 16*n)
	}
	if got := verify(0); len(got) != 0 {
		t.Errorf("block 0 is pinned by another, and %v was read", got)
	}
	for _, unpin := range unpins[1:] {
		unpin()
	}
	if len(r.blocks) != 3 || r.recent.Len() != 3 || r.pinned != 0 {
		t.Errorf("%d blocks are remembered, %d of them pinned; want 3 and 0", len(r.blocks), r.pinned)
	}
	for n := range int64(10) {
		verify(32 + 16*n)
	}
	if got := verify(0); !slices.Contains(got, 261*block) {
		t.Errorf("its first leaf is not pinned any more, and %v was read", got)
	}
}

func TestPinRefuses(t *testing.T) {
	const block = 512
	f := newTree(t, random(257*block, 1), VerityOptions{BlockSize: block})
	bad := flipped(f.blob, (262*block)*8) // the second leaf
	r := f.open(t).NewVerifier((&reader{blob: bad}).read, VerifierOptions{})
	end, unpin, err := r.Pin(context.Background(), 17*block)
	wantMismatch(t, err, "hash block", 1, 1, 262*block)
	if end != 32*block || unpin != nil || r.pinned != 0 {
		t.Errorf("up to %d, %d are pinned", end, r.pinned)
	}
	for _, off := range []int64{-1, 257 * block, 1 << 62} {
		if _, _, err := r.Pin(context.Background(), off); err == nil || errors.As(err, new(*MismatchError)) {
			t.Errorf("byte %d: %v", off, err)
		}
	}
	one := newTree(t, random(block, 1), VerityOptions{BlockSize: block})
	end, unpin, err = one.open(t).NewVerifier((&reader{blob: one.blob}).read, VerifierOptions{}).Pin(context.Background(), 0)
	if err != nil || end != block {
		t.Fatalf("a tree without hash blocks: up to %d, %v", end, err)
	}
	unpin()
}
