package main

import "github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"

// A kind of image, in the words of both.
type kind struct {
	name    string // in the tables
	flags   []string
	options mkerofs.Options
}

// allKinds are compared with what a user of each would take: lz4 with clusters of a
// block, for quick random reads, the others with 64 KiB, and the usual levels. Ends of
// files that are not worth compressing lie behind inodes, of whatever length with
// mkfs.erofs unless told otherwise, of up to half a block with us, which makes images
// 1 to 2 % larger and their metadata half as large; but none in "plain" and "lz4-flat".
func allKinds() map[string]kind {
	compressed := func(a mkerofs.Algorithm, level, cluster int) mkerofs.Options {
		return mkerofs.Options{InlineMax: 2048, Compression: mkerofs.Compression{Algorithm: a, Level: level, ClusterSize: cluster}}
	}
	fragments := compressed(mkerofs.Zstd, 3, 65536)
	fragments.Compression.Fragments = true
	flat := compressed(mkerofs.LZ4, 0, 0)
	flat.InlineMax = 0
	return map[string]kind{
		"plain":     {"plain", []string{"-Enoinline_data"}, mkerofs.Options{}},
		"inline":    {"plain, tails inline", nil, mkerofs.Options{InlineMax: 2048}},
		"lz4":       {"lz4 4 KiB", []string{"-zlz4"}, compressed(mkerofs.LZ4, 0, 0)},
		"lz4-flat":  {"lz4 4 KiB, no tails inline", []string{"-zlz4", "-Enoinline_data"}, flat},
		"lz4-64":    {"lz4 64 KiB", []string{"-zlz4", "-C65536"}, compressed(mkerofs.LZ4, 0, 65536)},
		"lz4hc":     {"lz4hc 64 KiB", []string{"-zlz4hc,9", "-C65536"}, compressed(mkerofs.LZ4HC, 9, 65536)},
		"zstd":      {"zstd 64 KiB", []string{"-zzstd,3", "-C65536"}, compressed(mkerofs.Zstd, 3, 65536)},
		"fragments": {"zstd 64 KiB, fragments", []string{"-zzstd,3", "-C65536", "-Efragments"}, fragments},
		"deflate":   {"deflate 64 KiB", []string{"-zdeflate,3", "-C65536"}, compressed(mkerofs.Deflate, 3, 65536)},
	}
}
