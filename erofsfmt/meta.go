package erofsfmt

import (
	"context"
	"fmt"
	"io"
)

// pageSize is the unit in which metadata is read and remembered. It is not the
// image's block size: an image with blocks of 512 bytes would be read in tiny
// pieces, one with blocks of 64 KiB in pieces far larger than an inode.
const pageSize = 4096

// A metaReader reads metadata. It holds on to the last page, so reading
// neighbours costs neither a lock nor a copy. It serves one call and is not
// shared.
type metaReader struct {
	im    *Image
	page  []byte
	at    place  // of page
	spill []byte // for what crosses pages
}

// bytes returns n bytes at a place, valid until the next call.
func (m *metaReader) bytes(ctx context.Context, at place, n int) ([]byte, error) {
	if i := at.off - m.at.off; at.src == m.at.src && i >= 0 && i+int64(n) <= int64(len(m.page)) {
		return m.page[i : i+int64(n) : i+int64(n)], nil
	}
	if err := m.load(ctx, at); err != nil {
		return nil, err
	}
	i := int(at.off - m.at.off)
	if i+n <= len(m.page) {
		return m.page[i : i+n : i+n], nil
	}
	if cap(m.spill) < n {
		m.spill = make([]byte, n)
	}
	m.spill = m.spill[:n]
	for done := copy(m.spill, m.page[i:]); done < n; {
		if err := m.load(ctx, at.plus(int64(done))); err != nil {
			return nil, err
		}
		done += copy(m.spill[done:], m.page)
	}
	return m.spill, nil
}

// load makes the page that holds a place the current one.
func (m *metaReader) load(ctx context.Context, at place) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	size, err := m.im.metaSize(ctx, at.src)
	if err != nil {
		return err
	}
	if at.off < 0 || at.off >= size {
		return &FormatError{Off: at.off, What: fmt.Sprintf("metadata past the end, which is at %d", size), Err: io.ErrUnexpectedEOF}
	}
	base := at.off &^ (pageSize - 1)
	key := cacheKey{at: place{at.src, base}, layer: m.im.layer}
	page, ok := m.im.pages.get(key, 1)
	if !ok {
		page, err = m.im.pages.fill(ctx, key, 1, func() (*block, error) {
			p := make([]byte, min(pageSize, size-base))
			return &block{data: p}, m.im.readPlace(ctx, p, key.at)
		})
	}
	if err != nil {
		return err
	}
	m.page, m.at = page.data, key.at // never released: others hold on to m.page
	return nil
}

// metaSize is how many bytes of metadata there can be: metadata is in the
// image itself or in the metabox, never on an extra device.
func (im *Image) metaSize(ctx context.Context, src int) (int64, error) {
	if src != inMetabox {
		return im.sources[src].Size(), nil
	}
	box, err := im.metaboxInode(ctx)
	if err != nil {
		return 0, err
	}
	return box.Size, nil
}
