package main

import (
	"fmt"
	"sync"

	"github.com/erofs-oci/erofs-oci/registry/verified"
)

// sameBlobs are the blobs of an image that nothing verifies by parts. Layers with one
// digest share what the cache has of it, so they share what is known of it, too. The zero
// value has none.
type sameBlobs struct {
	mu sync.Mutex // guards what follows
	of map[string]*sameBlob
}

// A sameBlob is one of them.
type sameBlob struct {
	*verified.Same
	mu     sync.Mutex // guards what follows
	layers []*layerSource
}

// join gives what sees to it that the blob of s stays what it was, and poisons s if not.
func (b *sameBlobs) join(s *layerSource) *verified.Same {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.of == nil {
		b.of = make(map[string]*sameBlob)
	}
	is := b.of[s.digest]
	if is == nil {
		is = &sameBlob{}
		is.Same = verified.NewSame(is.changed)
		b.of[s.digest] = is
	}
	is.mu.Lock()
	defer is.mu.Unlock()
	is.layers = append(is.layers, s)
	s.aside.Go(s.awaitChange)
	return is.Same
}

func (b *sameBlob) changed(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.layers {
		s.change(err)
	}
}

// change has every read of s fail from now on. What else there is to do must not be done
// here, in the middle of a fetch.
func (s *layerSource) change(err error) {
	if s.wrong.CompareAndSwap(nil, &wrongError{fmt.Errorf("blob %s: %w", s.digest, err)}) {
		close(s.changed)
	}
}

// awaitChange does what else there is to do, once the blob has changed.
func (s *layerSource) awaitChange() {
	select {
	case <-s.open: // a layer with the same digest may be so already
	case <-s.life.Done():
		return
	}
	select {
	case <-s.changed:
	case <-s.life.Done():
	}
	select {
	case <-s.changed:
		s.revoke(s.wrong.Load())
	default:
	}
}
