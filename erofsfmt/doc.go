// Package erofsfmt reads EROFS images, every layout and algorithm of the format,
// from anything that can fill a buffer from an offset. It does not mount,
// write, log, open files or know where an image comes from; errors say what is
// wrong and where, and become errnos elsewhere.
//
//	im, err := erofsfmt.Open(ctx, src)
//	root, err := im.Inode(ctx, im.Root())
//	err = im.ReadDir(ctx, &root, 0, func(e erofsfmt.Dirent) bool { … })
//
// Files are addressed by nid; nothing is kept for a file that was looked at, so
// memory does not grow with the number of files. FS gives the io/fs view.
//
// # The image
//
//	0     1024         4096
//	| any | superblock | … metadata and data, in any order … |
//
//	superblock  128 bytes, 16 more for each extension slot, then the
//	            configurations of the compression algorithms
//	inode nid   at MetaBlkaddr·blocksize + 32·nid, 32 or 64 bytes, then its
//	            xattrs, then its inline data or the index of its extents
//	nid bit 63  the same, but in the decoded data of one file, the metabox
//
// Numbers are little-endian. Blocks have 512 bytes to 64 KiB.
//
// # Where the bytes of a file are
//
//	layout            after the inode                   the data
//	plain                                               one run of blocks
//	inline            the last, partial block           one run of blocks
//	chunk             a table of chunk addresses        chunks, also on other devices
//	compressed        an entry for each lcluster, or    pclusters
//	                  a record for each extent
//
// A compressed file is a row of extents. An extent is decoded from a pcluster,
// a run of blocks (or, with records, of bytes). The index of the full and
// compact layouts has an entry for each lcluster, usually a block of the file:
//
//	file      |········|········|········|········|········|
//	lcluster  0        1        2        3        4
//	          HEAD ofs=0        |  HEAD ofs=300   |
//	                   NONHEAD  |        NONHEAD  HEAD ofs=9
//	extents   [ 0 ────────────── 2·4096+300 )[ ──────── 4·4096+9 )[ …
//
// A HEAD says where in its lcluster an extent begins and where the pcluster
// is; a NONHEAD how far it is to the heads before and after it. The last extent
// may lie inline after the index (ztailpacking), or, like a whole small
// file, in the packed inode (fragments).
//
// extentAt is the one function that knows all this; it answers with an extent:
// a hole, bytes that are stored somewhere, or encoded bytes. One loop reads
// extents: what is contiguous on the source is read at once; stored bytes and
// whole extents land in the caller's buffer without a copy.
//
// # Several images
//
// OpenLayers opens images that lie over each other, as the layers of a container image
// do, and shows them as one Image, by the rules of overlayfs. A nid has the number of
// its layer in front then, and it is still true that nothing is kept for a file.
//
// # What is supported
//
//	block sizes         512 B to 64 KiB, whatever the host's page size
//	superblock          checksum; extension slots; 48-bit blocks and root
//	inodes              compact, extended, across blocks; in the metabox; negative, far
//	                    and nanosecond times; 32-bit ids
//	plain, inline       holes; inline data in the metabox
//	chunks              block maps and indexes, 32 and 48 bits, holes
//	devices             given, by id or by address; or inside the image
//	directories         any layout, "." left out
//	xattrs              inline, shared, long prefixes wherever they are, name filter
//	indexes             full; compact of 4 and 2 bytes; records of 4, 8, 16 and 32 bytes
//	extents             HEAD2, big pclusters, holes, inline and fragment tails,
//	                    partial references, plain shifted and interlaced
//	lz4                 with and without zero padding
//	lzma, deflate, zstd as configured in the superblock
//
// Everything else is ErrUnsupported and named: feature bits, algorithms,
// layouts and configurations that are not above.
//
// # Metadata beforehand
//
// For a source that is far away LoadMetadata finds out what listing the image will read, and
// has it brought near in few requests.
//
// # Hostile images
//
// Nothing that an image says is believed. Sizes are bounded before anything is
// allocated: a pcluster has at most 1 MiB and decodes to at most 12 MiB, a
// directory block has one block, a name 255 bytes, an xattr 64 KiB. Every walk
// moves towards an end. What is past the end of a source is an error and never
// zeros. What the package does not do is to detect a directory that contains
// itself: a caller that walks trees has to. Check does, and looks for all
// else that can be wrong with an image.
package erofsfmt
