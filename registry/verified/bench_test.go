package verified_test

import (
	"context"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry/verified"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// BenchmarkVerify is the hook, for one chunk of a cache.
func BenchmarkVerify(b *testing.B) {
	const unit, size = 256 << 10, 32 << 20
	for name, o := range map[string]verifiable.Options{"index": {Chunk: unit}, "tree": {Verity: true}} {
		blob := verifiable.Make(b, random(size), o)
		s := serve(blob.Data, nil)
		var hook func(ctx context.Context, p []byte, off int64) error
		if o.Verity {
			tree, err := verified.OpenTree(b.Context(), s, root(b, blob))
			if err != nil {
				b.Fatal(err)
			}
			hook = tree.Verify
		} else {
			x, err := verified.ReadIndex(b.Context(), s, s, place(blob))
			if err != nil {
				b.Fatal(err)
			}
			hook = x.Verify
		}
		b.Run(name, func(b *testing.B) {
			b.SetBytes(unit)
			b.ReportAllocs()
			b.ReportMetric(float64(len(blob.Data)-size), "overhead-bytes")
			for i := range b.N {
				off := int64(i) * unit % size
				if err := hook(b.Context(), blob.Data[off:off+unit], off); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
