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
// Version comes first, digests are sorted, reads of a blob are sorted by order. An order is the place of a read among
// those of all blobs: 0, 1, 2, … No byte is in two reads, and two that follow each other in that sequence and in their
// blob are one. So profiles that say the same are the same bytes. What is read back need not be so, only right: it is
// brought into that form.
//
// # Order
//
// Two goals are at odds: a replay is to follow the run as closely as it can, and two recordings of the same run are to
// be the same bytes although what a run asks for at the same time (a kernel's readahead, several layers that are opened)
// comes in any order. So what was touched is remembered by the chunks of the cache, and when it was first touched by
// regions of 2 MiB:
//
//	blob       | region 0        | region 1: 2nd   | region 2        | region 3: 1st   |
//	chunks     | . . . . . . . . | X . . X . . . . | . . . . . . . . | . . . . . X X . |
//	reads                         [1]  [2]                                     [0,  ]
//
// Inside a region the offset decides. So a replay brings what the run needs of a region when it first needs anything of
// it, which is too early by a region or two, and which of two reads inside a region came first does not matter. Across
// regions two rules help: the first region of each blob, which has the superblock, comes before all others, in the order
// of the layers; and of two regions that lie side by side and were touched one right after the other the lower one comes
// first, since a file that crosses their border is asked for on both sides at the same time.
//
// The size of a region is measured: with 4 MiB a replay of a Python program, over 20 ms and 25 MB/s, came too late for
// a quarter of what it had to wait for without (8 of 32), with 2 MiB for 1 or 2. With less than that, recordings of the
// same run differed now and then.
//
// The package knows nothing of caches, registries or file systems, and fetches nothing.
package profile
