// Package blobcache keeps the parts of blobs that were read on disk, and fetches each part once, however many readers
// want it, in however many processes, today or next week.
//
// A blob is cut into chunks of 256 KiB. To a process, a chunk is absent, in flight or present:
//
//	ReadAt ── all present ──────────────────────────────────────────── pread ──► p
//	   │                                                                 ▲
//	   └─ some absent ─► claim them, join those in flight ─► wait, a chunk at a time
//	                       │
//	                       └─► flights, one for each run of adjacent absent chunks
//	                             on disk? ─► checksum, Verify ──────────────────────────┐
//	                             another process fetches it? ─► wait until it has ──────┤
//	                             else Fetch ─► body ─► chunk whole ─► Verify ─► pwrite ─┴─► presence bit ─► waiters leave
//
// A flight belongs to the Blob that began it and a wait to the reader: a reader leaves when its own chunks are there
// or its context ends, and the flight goes on for the others until Close. What a flight could not bring is absent
// again, and the readers who waited for it get its error: nothing is ever filled in. A body that verifies by itself what
// it gives can say of some of its bytes that they do not come, and go on behind them (see Fetcher).
//
// A server that answers the whole blob to a request for a range is read to its end, since to ask again would bring
// the whole again. Such a flight is the blob's stream: it publishes every chunk that passes, readers of chunks that
// are still to come wait for it, and it takes over what other flights have asked for but not begun to receive. (Of two
// processes each has its own stream.)
//
// Before anybody waits for them, chunks are fetched that will probably be read next: a window in front of whoever goes
// forward through the blob, and the rest of a region of which half was read (see guesser). What is guessed from is the
// first read of each chunk, whether it was absent or fetched ahead; all other reads pay for a look at one bitmap. A
// guess goes behind the flight that is just to begin, or is a flight of its own. It has no claim on the limit for what
// somebody waits for, has a limit of its own, and where that is reached it is dropped, not queued. A reader of a chunk
// that is fetched ahead waits for it as for any other; if that fails, the reader fetches it, and nothing is guessed
// until something goes well again.
//
// What other blobs are verified by may lie here, too (see OpenOptions.Beneath). A flight that has a slot then waits for a
// read of that blob, whose flights therefore have slots of their own, so that those are never all taken by who waits. It is
// read once, and needed as long as those who are verified by it: so as long as it is open, all that is here of it counts as
// read just now.
//
// # In the background
//
// Blob.Prefetch brings what nobody waits for yet, and may never do so, behind all who wait:
//
//	a reader waits, in any blob of the cache ── no flight of the background begins
//	                                            those under way stop reading their bodies, for 2 s at most
//	for a chunk of one that has not begun ───── the reader has a flight of his own, and the chunk is left out
//	for chunks of those under way only ──────── they go on, at no limit, until the chunks are there
//	                                            others may begin, and read until the body of one of these is there
//
// A prefetch goes through its range in pieces of up to 4 MiB, but no more than comes in a quarter of a second (512 KiB,
// as long as no body has shown how much that is), or than a rate allows for a second. Its flights have slots of their
// own (MaxPrefetches) and are otherwise like those of readahead: they take the locks of their chunks as they begin,
// what other processes fetch is waited for, what they bring is fresh until somebody reads it, and their failures are
// not those of readers, but of Prefetch, which ends with the first. Readers in other processes have them wait in the
// same way, but for 2 s before a flight begins and for 2 s once its body is there: such a process may stand still, or
// its registry. That is seen by a lock within 10 ms (see outside); who waits for the lock of a chunk does not hold it,
// and waits no longer than a pause and a piece take. At a rate of less than a chunk a second that would be long: there
// a flight waits before it begins, and then reads its one chunk at once. A stream of the background locks a chunk only
// to write it.
//
// A pause is that nobody reads from the body: what the kernel has room for still comes, and then the server waits. A
// Fetcher that bounds the time without progress must count only the time inside Read, as package registry does; a
// pause is not taken for a silence of the server here, either. The most that a pause costs is that the server breaks
// off, for which 2 s are no reason to any that we know: then the Fetcher asks for the rest, or the flight fails. A flight
// that has paused for so long altogether goes on beside the readers, but no other one begins. A stream pauses anew after
// each 4 MiB.
//
// What is prefetched may evict only what was last used before the prefetches began: not what another one brought a
// moment ago, nor what was read meanwhile. Where that does not do, or the disk is full, Prefetch ends with ErrNoRoom.
//
// # On disk
//
// The directory is its owner's alone. It has a file for each blob, unit and origin, named after the digest, the unit
// and a hash of size and origin (see OpenOptions.Origin), with byte i of the blob at base + i and holes where chunks
// are absent; in front of that a checksum of each chunk that is there (see format.go), and "space", the number of bytes
// that all of them take.
//
// # Several processes
//
// They speak through locks on ranges of the files, which the kernel drops with the process that held them (whoever evicts
// for longer lets others have the directory's every 50 ms):
//
//	directory  exclusive, for a moment: opening, removing and evicting, and changing the number in "space"
//	waiting    shared by who has flights that somebody waits for: others let them go first with what nobody waits for
//	blob       shared by who has it open; whoever gets it exclusively may remove the file, or make it anew
//	doubt      shared by who was told that the disk lost something of the blob; others believe nothing of it either
//	chunk      exclusive: its fetch, until it is here. Others wait, look again and again, and take over when the lock is free
//	           By and by they ask by themselves (see Options.Patience)
//	region     shared, 4 MiB: its lease. Who has it may read chunks there; who gets it exclusively may punch a hole
//
// So the bitmap of present chunks, which is in memory, can be believed without asking anybody: it has bits only for
// leased regions, where no other process punches. Leases of what was not read for 20 s are given up where there are
// other processes, but for OpenOptions.Beneath and Keep. This process itself, when it evicts, clears the bits first, counts a generation up, and then makes
// the hole; a reader of present chunks compares the generation before its look at the bitmap with that after its
// pread, and begins anew where they differ. That costs two loads. A lock around each pread, or a generation in the
// file, would be system calls: see BenchmarkGuard. A region that somebody waits for, or that something is in flight
// to, is not evicted at all.
//
// Nor is a chunk written over where another process may read it: one that a hook refuses is replaced only if its region
// can be had exclusively; else this process does without keeping its own. And a blob that turned out to be wrong is not
// taken away from its readers, but its file loses its name (see Purge).
//
// # Crashes
//
// Nothing is synced and nothing is marked clean or unclean. A chunk's data is written before its checksum, so whatever
// a killed process leaves is whole; of what a power failure leaves, any sector may be old or missing. Therefore a
// process believes no chunk that it finds: it reads all of it and compares the checksum (and calls Verify) before its
// first use, once for each lease. A chunk that differs is fetched again; where Verify could not tell, it stays. A bit
// that flips on disk later, while the lease lasts, is noticed with Options.Paranoid only.
//
// A write that the kernel could not bring to the disk says nothing to who made it, or reads there. So the kernel is asked
// each second, and where it failed, nothing of the file is believed that was not read from the disk since: see
// writeback.go.
//
// # Limits
//
// Before a chunk is written, its bytes are taken from what Options.MaxBytes and MinFree allow; where there are none
// left, regions that were not read for longest are evicted, of whatever blob. Each process is granted some MiB at a time,
// and the less of a small cache the more processes there are (see space). If nothing can be, since all is in use,
// or the disk is full after all, no read fails: the chunk is handed to those who wait for it and is absent afterwards,
// which is logged once.
//
// The package does not retry, bound how long a fetch may take, or know how to verify: the Fetcher does the first two,
// the hook the third. It knows nothing of HTTP or registries, nor of what is in a blob. It takes a local file system
// with locks (ext4, xfs, btrfs, tmpfs); one without hole punching gives back whole blobs only.
package blobcache
