// Package profile says what a run read of the blobs of an image, and in which order, so that the next run finds it
// fetched already.
//
// A profile is recorded where reads enter (see Recorder), kept in a file, and replayed by whoever can fetch (see
// Profile.Reads). It names blobs by digest: it is good for any image, reference and registry that has them, and for
// nothing else.
//
// # The file
//
// It is JSON of one line that ends with a newline, without any other white space:
//
//	{"version":1,"blobs":{"sha256:…":{"size":N,"reads":[[order,offset,length],…]},…}}
//
// Version comes first, digests are sorted, reads of a blob are sorted by order and then by offset. No byte is in two
// reads, reads that touch and have the same order are one, and the orders of all blobs together are 0, 1, 2, … without
// a gap. So profiles with the same content are the same bytes. What is read back need not be so, only right: it is
// brought into that form.
//
// # Order
//
// Two goals are at odds: a replay is to follow the run as closely as it can, and two recordings of the same run are to
// be the same bytes although what a run asks for at the same time (a kernel's readahead, several layers that are
// opened) comes in any order. So what was touched is remembered by the chunks of the cache, and when it was first
// touched by regions of 4 MiB:
//
//	blob       | region 0: first touched 2nd |  region 1: 1st  | region 2 |  region 3: 3rd  |
//	chunks     | . . X X . . . X . . . . . . | X . . . . . . . | . . . .  | . . . . . X X X |
//	reads          [1,…]     [1,…]             [0,…]                              [2,…]
//
// Inside a region the offset decides. So a replay brings what the run needs of a region when it first needs anything of
// it, which is too early by 4 MiB at most, and which of two reads inside a region came first does not matter. Across
// regions two rules help: the first region of each blob, which has the superblock, comes before all others, in the order
// of the layers; and of two regions that lie side by side and were touched one right after the other the lower one comes
// first, since a file that crosses their border is asked for on both sides at the same time.
//
// The package knows nothing of caches, registries or file systems, and fetches nothing.
package profile
