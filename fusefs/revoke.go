package fusefs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// revoking is how a file system ends its service whose bytes have turned out not to be the
// image's: from then on every request fails. It remembers which nodes the kernel may keep
// data of, one bit each, since the kernel can be told to forget a node's and not all. A
// nil one is that of a file system which is never revoked, and costs nothing.
type revoking struct {
	server atomic.Pointer[fuse.Server]
	reason atomic.Pointer[error]

	mu   sync.Mutex // guards what follows
	read map[uint64]*[nodesTogether / 64]uint64
}

// nodesTogether are noted in one piece: the node ids of EROFS lie close to each other.
const nodesTogether = 4096

// why is the reason, or nil as long as all is well.
func (r *revoking) why() error {
	if r == nil {
		return nil
	}
	if err := r.reason.Load(); err != nil {
		return *err
	}
	return nil
}

// note is called before data of a node is given to the kernel.
func (r *revoking) note(node uint64) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.read == nil {
		r.read = make(map[uint64]*[nodesTogether / 64]uint64)
	}
	bits := r.read[node/nodesTogether]
	if bits == nil {
		bits = new([nodesTogether / 64]uint64)
		r.read[node/nodesTogether] = bits
	}
	bits[node%nodesTogether/64] |= 1 << (node % 64)
}

// nodes are those that were noted.
func (r *revoking) nodes() []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []uint64
	for first, bits := range r.read {
		for i := range uint64(nodesTogether) {
			if bits[i/64]>>(i%64)&1 != 0 {
				all = append(all, first*nodesTogether+i)
			}
		}
	}
	return all
}

// Revoke has every request fail from now on that comes to us, with EIO and why in the log,
// and the kernel forget the data that it keeps. Names and attributes that the kernel has
// it goes on to show; so does who has mapped a page and does not look again. The error is
// errors.ErrUnsupported where the kernel reads the image itself.
func (m *mount) Revoke(why error) error {
	if m.revoking == nil {
		return fmt.Errorf("revoke the mount on %s: %w", m.target, errors.ErrUnsupported)
	}
	m.revoking.reason.Store(&why)
	server := m.revoking.server.Load()
	if server == nil {
		return nil // nothing was asked for yet
	}
	var errs []error
	for _, node := range m.revoking.nodes() {
		// ENOENT: the kernel has forgotten the node by itself.
		if st := server.InodeNotify(node, 0, 0); !st.Ok() && st != fuse.ENOENT {
			errs = append(errs, fmt.Errorf("node %d: %v", node, st))
			break // the next ones would fare no better
		}
	}
	return errors.Join(errs...)
}
