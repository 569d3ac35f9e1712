// Package faults proves what becomes of a read when a registry misbehaves.
//
// Its tests put the parts together as a mount does, but for the kernel:
//
//	reader → blobcache → registry.Blob → HTTP → fakeregistry, with a fault
//
// TestFaults is a table of faults by ways to read. A row says whether reads must
// succeed, with the blob's bytes, or must fail, with an error of a certain kind within
// the deadline and a log that says why; and whether any byte may come twice, and why.
// TestLongMount is a mount whose tokens, signed URLs and credentials all expire, many
// times over.
package faults
