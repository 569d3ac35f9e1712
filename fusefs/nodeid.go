package fusefs

import "github.com/erofs-oci/erofs-oci/erofsfmt"

// nodeIDs maps EROFS nids to FUSE node ids and back.
//
//	nid            node id
//	root           1
//	n              n+2               (so that 0, a legal nid, is not 0, no legal node id)
//	bit 63 | n     bit 63 | n+2      (an inode in the metabox)
//
// A nid counts slots of 32 bytes of an image of less than 2^63 bytes, so n+2
// never reaches bit 63 for a nid that can be read; nor for one that has the number of
// its layer in front (erofsfmt.OpenLayers), of which there are fewer than fit.
type nodeIDs struct{ root erofsfmt.Nid }

const (
	rootNode   = 1
	metaboxBit = 1 << 63
)

func (ids nodeIDs) node(n erofsfmt.Nid) uint64 {
	if n == ids.root {
		return rootNode
	}
	return uint64(n)&metaboxBit | (uint64(n)&^metaboxBit+2)&^metaboxBit
}

func (ids nodeIDs) nid(node uint64) erofsfmt.Nid {
	if node == rootNode {
		return ids.root
	}
	return erofsfmt.Nid(node&metaboxBit | (node&^metaboxBit-2)&^metaboxBit)
}
