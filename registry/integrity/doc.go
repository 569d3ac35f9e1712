// Package integrity tells bytes that somebody changed from bytes that nobody did:
// it reads, verifies and writes the two structures by which a part of a blob can be
// verified without the rest, the chunk index and the dm-verity tree of an EROFS layer.
//
// It knows nothing of HTTP, caches, manifests or annotations: bytes and numbers come
// in, and an error or nil comes out. All integers of both structures are
// little-endian.
//
// # Chunk index
//
// The format application/vnd.erofs.chunk-index.v1 of erofs-image-spec, section 3.4. An
// image is cut into chunks, each of which is stored as it is (compression 0) or as one
// zstd frame (compression 1), and the index lists them:
//
//	  0  CD E4 EC 67                  magic
//	  4  u8   version                 1
//	  5  u8   compression             0 none, 1 zstd
//	  6  u16  flags                   0
//	  8  u64  uncompressed size       of the image and of the dm-verity tree behind it
//	 16  u32  N, the number of chunks 0 only where that size is 0
//	 20  u8   hash algorithm          0 no checksums, 1 SHA-2
//	 21  u8   hash size H             0; or 32 SHA-256, 64 SHA-512
//	 22  10 bytes of zeros
//	 32  N entries of 16+H bytes
//
//	entry
//	  0  u64  where the stored chunk begins in the blob
//	  8  u64  where the chunk begins in the image
//	 16  H    digest of the chunk *as it is stored*, before it is decompressed
//
// A chunk ends where the next one begins, in the image as in the blob. The last one
// ends, in the image, at the uncompressed size and, in the blob, with zstd, where the
// index begins; that is the end of the blob for an index in a blob of its own. (What a
// writer put between them, a padding frame for instance, belongs to the last chunk.)
//
// In a blob the index is the last thing, with zstd inside a skippable frame:
//
//	none:  image [dm-verity] index
//	zstd:  frame frame … frame [5? 2A 4D 18  u32 length  index]
//
// An image that is not compressed lies in its blob from byte 0 on, so there both
// offsets of an entry are the same, and an index that says otherwise is refused:
// whoever reads the blob from front to back would see another image.
//
// # dm-verity
//
// Hash type 1, as veritysetup makes it and the kernel's dm-verity verifies it. The
// tree covers all that precedes it, and its superblock fills a block of B bytes (B is
// the block size of data and hashes alike, 4096 unless said otherwise):
//
//	 0             data               blocks 0, 1, …
//	 hash offset   superblock         and zeros, to the end of the block
//	 + B           level L            one block: its digest is the root digest
//	               …
//	               level 1            the digests of the data blocks, in order
//
//	superblock
//	  0  "verity\0\0"
//	  8  u32  version        1
//	 12  u32  hash type      1
//	 16  16   UUID
//	 32  32   algorithm      "sha256" or "sha512", and zeros
//	 64  u32  data block size
//	 68  u32  hash block size
//	 72  u64  number of data blocks
//	 80  u16  salt size      at most 256
//	 82  6 bytes of zeros
//	 88  256  salt, and zeros
//	344  168 bytes of zeros
//
// The digest of a block is H(salt ‖ block). A hash block holds B/H digests, of as many
// blocks of the level below it, and zeros behind the last one; level 1 is as long as it
// takes, and levels are added until one has a single block. Data of a single block has
// no level at all: its digest is the root digest. So it is in cryptsetup's
// lib/verity/verity_hash.c and the kernel's drivers/md/dm-verity-target.c.
//
// # What is promised
//
// [ChunkIndex.Verify] returning nil means that the bytes have the digest that the index
// says, and [Verifier.Verify] returning nil means that they are what was there when the
// root digest was made. Whatever the bytes of an index, superblock or tree: there is no
// panic, and no more memory is taken than a small multiple of the bytes handed in,
// besides the verifier's cache, which is bounded.
//
// # What is not
//
//   - An index proves nothing by itself. It must have been verified first, by a digest
//     from the manifest (org.erofs.chunk-index.digest, or the layer's for an index in a
//     blob of its own). [ParseChunkIndex] cannot tell whether that was done.
//   - The root digest must come from the manifest, never from the blob.
//   - An index may have no checksums. It then finds chunks and verifies none:
//     [ChunkIndex.Checksums] says so, and [ChunkIndex.Verify] returns [ErrNoChecksum].
//   - What is not in the image is not covered: with a chunk index the index itself;
//     with dm-verity the UUID and the zeros behind the superblock. The rest of the
//     superblock is: it changes digests, or it is refused.
//   - A digest tells that bytes are wrong, not who made them: that is for a signature
//     of the manifest.
package integrity
