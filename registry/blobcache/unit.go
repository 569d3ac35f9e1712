package blobcache

// Unit is how many bytes a chunk of the blob has; the last one may have fewer.
func (b *Blob) Unit() int64 { return b.store.chunkSize }
