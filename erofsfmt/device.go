package erofsfmt

import "context"

// Places that are not a source: the decoded data of two inodes that hold
// what belongs to others.
const (
	inPacked  = -1
	inMetabox = -2
)

// A place is where bytes are: offset off of sources[src], or of the decoded
// data of the packed inode or the metabox.
type place struct {
	src int
	off int64
}

func (p place) plus(n int64) place { return place{p.src, p.off + n} }

// farAway is past the end of every source, with room to add a file's size.
const farAway = int64(1) << 62

// blockOff is the byte offset of a block. One that is too large for an
// offset is far away, where reads fail.
func (im *Image) blockOff(blk uint64) int64 {
	if blk >= uint64(farAway)>>im.sb.BlockBits {
		return farAway
	}
	return int64(blk << im.sb.BlockBits)
}

// deviceAt finds the source of a physical address (fs/erofs/data.c
// erofs_map_dev). A device has an id, or its blocks have addresses in the
// image's own space, or, where no devices are given, both.
func (im *Image) deviceAt(id int, pa int64) (place, error) {
	given := len(im.sources) > 1
	if id > len(im.sb.Devices) {
		return place{}, place{0, pa}.corrupt("device id %d of %d", id, len(im.sb.Devices))
	}
	if id > 0 && given {
		return place{id, pa}, nil
	}
	if id > 0 {
		return place{0, pa + im.blockOff(im.sb.Devices[id-1].Uniaddr)}, nil
	}
	if !given {
		return place{0, pa}, nil
	}
	for i, d := range im.sb.Devices {
		start, n := im.blockOff(d.Uniaddr), im.blockOff(d.Blocks)
		if d.Uniaddr != 0 && pa >= start && pa-start < n {
			return place{i + 1, pa - start}, nil
		}
	}
	return place{0, pa}, nil
}

// deviceMask keeps the bits of a chunk's device id that count.
func (im *Image) deviceMask() uint16 {
	mask := uint16(1)
	for int(mask) < len(im.sb.Devices)+1 && mask != 0 {
		mask <<= 1
	}
	return mask - 1
}

// readPlace fills p from a place.
func (im *Image) readPlace(ctx context.Context, p []byte, at place) error {
	var holder *Inode
	var err error
	switch at.src {
	case inPacked:
		holder, err = im.packedInode(ctx)
	case inMetabox:
		holder, err = im.metaboxInode(ctx)
	default:
		err := readSource(ctx, im.sources[at.src], p, at.off)
		if fe, ok := err.(*FormatError); ok {
			fe.In = at.in()
		}
		return err
	}
	if err != nil {
		return err
	}
	if at.off < 0 || at.off > holder.Size-int64(len(p)) {
		return at.corrupt("%d bytes past the end of nid %d, which has %d", len(p), holder.Nid, holder.Size)
	}
	return im.ReadFile(ctx, holder, p, at.off)
}
