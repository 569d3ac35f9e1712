// Package verified sees to it that bytes of a blob are used only if they are those that
// the blob's manifest vouches for, where it vouches for parts: by a chunk index or by a
// dm-verity tree. What a wrong byte is, package integrity knows; here is where index and
// tree come from, and what becomes of bytes that are wrong.
//
// What is below brings bytes and is not believed:
//
//	Fetch(ctx, off, n) (body, start, total, err)     registry.Blob, usually
//
// and what is above gets one of two shapes of the same promise:
//
//	            ┌ Index, Tree ─┐ a Fetcher, whose bodies are not verified, and its hook
//	below ──────┤              │ Verify, which a cache calls with each chunk before
//	            │              ┘ anybody can read it
//	            └ Stream ─────── a Fetcher, whose bodies are verified bytes only
//
// The hook is for a cache whose chunks are the index's own, or whole blocks of the tree.
// The stream is for all else: an index with chunks of many sizes, and one of compressed
// chunks, which have to be verified before they are decompressed. With either, a chunk that
// cannot be had does not take its neighbours with it.
//
// Where a blob has both, the index is enough. Both are bound to the manifest by one
// digest, and the index's covers the image and its tree; it is one hash for a chunk where
// the tree takes one for each of its blocks, and it is one small GET where the tree is
// 0.8 % of the image.
//
// # What is wrong is fetched again
//
// A chunk, index or part of a tree that is not what it should be is fetched again, and
// from elsewhere if what is below knows another place (see elsewhere): as often as there
// are places, and at least once. Then it is an error, which wraps the
// *integrity.MismatchError of the last try. What a hook finds wrong the cache has to ask
// for again; the hook says by a Temporary error that it should. So does the body of a
// stream: in the place of a wrong chunk it has an error, of that chunk alone, and goes on
// behind it. It fetches nothing by itself, since it has a connection, which may be the only
// one.
//
// # The tree
//
// It is read lazily, in parts of 256 KiB, which are the digests of 32 MiB of data. It is
// not read through the cache whose chunks it verifies: a chunk could wait there for a
// part of the tree that waits for the chunk's turn to end. So a Tree has a reader of its
// own, which remembers 16 MiB of parts as they came, and the integrity.Verifier remembers
// the blocks that were verified. A random reader of an image of more than 2 GiB fetches
// parts twice.
//
// Who has a connection, and waits for a part of the tree that needs another one, may wait for
// ever where connections are few. So the parts that a range needs are fetched before its
// body is, and their blocks stay until the body is closed: see Tree.Prepare. The exception
// is what a server sends beyond the range that it was asked for, since it does not know
// ranges.
//
// # Without either
//
// [CheckWhole] is what is left: the digest of the blob, when every byte of it is here.
// Until then nothing is known, and nothing here says otherwise. It is the digest of what
// is there at that moment. That this is what was there before, and what will be there, is
// for who keeps the blob to know, as package blobcache does (Blob.Examine, Blob.Changed).
package verified
