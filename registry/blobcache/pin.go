package blobcache

import "sync"

// Pin has what is here of the blob stay until release is called, as if all of it were being read: it is not evicted by
// this process, nor by others what of it this process has read. It is for who reads a blob more than once, from front to
// back.
func (b *Blob) Pin() (release func()) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pinned++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pinned--
	})
}
