package nbdserve

// maxExtents bounds the descriptors of one context in one reply. The client asks
// for the rest.
const maxExtents = 2048

// What x-erofs-oci:fetched says of a range.
const (
	statusAbsent  = uint32(0)
	statusFetched = uint32(1)
)

// An extent is a run of bytes of one status. It does not leave the range that was
// asked about, so that its length is no longer than the request's.
type extent struct {
	length uint64
	status uint32
}

// blockStatus answers with one chunk for each context of the client's.
func (c *session) blockStatus(q request) error {
	limit := maxExtents
	if q.flags&flagReqOne != 0 {
		limit = 1
	}
	for i, m := range c.contexts {
		extents := c.s.extents(m.id, q, limit)
		b, err := c.room(c.dialect.headSize() + statusSize(c.dialect, len(extents)))
		if err != nil {
			return err
		}
		var flags uint16
		if i == len(c.contexts)-1 {
			flags = replyDone
		}
		c.dialect.putStatus(b, q, flags, m.id, extents)
		c.commit(len(b))
	}
	return nil
}

// extents cuts the range of q, which is not empty, into at most limit extents.
func (s *Server) extents(context uint32, q request, limit int) []extent {
	if context == contextAllocation {
		// A blob has no holes, and that its zeros are zeros is not known before they are fetched.
		return []extent{{q.length, 0}}
	}
	var all []extent
	for off, end := q.offset, q.offset+q.length; off < end && len(all) < limit; {
		status, next := s.fetched(off)
		next = min(max(next, off+1), end)
		all = append(all, extent{next - off, status})
		off = next
	}
	return all
}

// fetched asks the source. The zeros past its end are as its last byte is.
func (s *Server) fetched(off uint64) (status uint32, end uint64) {
	size := s.export.Source.Size()
	present, e := s.present.Present(min(int64(off), size-1))
	if e >= size {
		e = s.size
	}
	if present {
		return statusFetched, uint64(max(0, e))
	}
	return statusAbsent, uint64(max(0, e))
}

// statusSize is the payload of a status chunk with n extents.
func statusSize(d dialect, n int) int {
	if d == extended {
		return 8 + 16*n
	}
	return 4 + 8*n
}

// putStatus writes a status chunk to b, which is as long as it.
func (d dialect) putStatus(b []byte, q request, flags uint16, context uint32, extents []extent) {
	kind := chunkBlockStatus
	if d == extended {
		kind = chunkBlockStatusExt
	}
	head := d.headSize()
	d.putHead(b, q, flags, kind, len(b)-head)
	b = b[head:]
	be.PutUint32(b, context)
	if d == extended {
		be.PutUint32(b[4:], uint32(len(extents)))
		for i, e := range extents {
			be.PutUint64(b[8+16*i:], e.length)
			be.PutUint64(b[16+16*i:], uint64(e.status))
		}
		return
	}
	for i, e := range extents {
		be.PutUint32(b[4+8*i:], uint32(e.length))
		be.PutUint32(b[8+8*i:], e.status)
	}
}
