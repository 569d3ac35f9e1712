package registry

import (
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types. The EROFS ones follow a draft whose names may still change, so
// no other file spells one out.
const (
	// MediaTypeErofs is a raw EROFS image: the form that is written.
	MediaTypeErofs = "application/vnd.erofs"
	// MediaTypeErofsZstd is an EROFS image in zstd frames.
	MediaTypeErofsZstd = "application/vnd.erofs+zstd"
	// MediaTypeChunkIndex is a chunk index for the layer before it.
	MediaTypeChunkIndex = "application/vnd.erofs.chunk-index.v1"

	// MediaTypeContainerdErofs is a raw EROFS image under containerd's name.
	MediaTypeContainerdErofs     = "application/vnd.erofs.layer.v1"
	mediaTypeContainerdErofsZstd = "application/vnd.erofs.layer.v1+zstd"

	mediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerConfig   = "application/vnd.docker.container.image.v1+json"
	prefixDockerSchema1     = "application/vnd.docker.distribution.manifest.v1+"

	// annotationRole on a layer says what an EROFS layer is for. Without it, and with
	// roleLower, it is laid over those before it. The others are data that another
	// layer refers to, and cannot be mounted by themselves: an extra device of the
	// next layer, and a layer of files that are found by trusted.overlay.redirect.
	annotationRole = "org.erofs.role"
	roleLower      = "overlay-lower"
	roleDevice     = "device"
	roleData       = "overlay-data"

	// FeatureErofs in os.features marks the index entry whose layers are EROFS, and
	// their configuration.
	FeatureErofs = "erofs"

	// RoleLower on a layer says that it is one of several to be mounted over each
	// other.
	RoleLower = "overlay-lower"
)

// Annotations on the descriptor of an EROFS layer. The ones of a chunk index say
// where in the blob it is and what its bytes are; those of dm-verity say where the
// superblock is and what the tree leads up to.
const (
	AnnotationRole               = annotationRole
	AnnotationUncompressedDigest = "org.erofs.uncompressed-digest"
	AnnotationChunkIndexRange    = "org.erofs.chunk-index.range"
	AnnotationChunkIndexDigest   = "org.erofs.chunk-index.digest"
	AnnotationChunkIndexType     = "org.erofs.chunk-index.mediaType"
	AnnotationChunkIndexTarget   = "org.erofs.chunk-index.target" // of one in a blob of its own: the layer's digest
	AnnotationVerityOffset       = "org.erofs.dmverity.hash_offset"
	AnnotationVerityRoot         = "org.erofs.dmverity.root_digest"
	AnnotationVerityBlockSize    = "org.erofs.dmverity.block_size"

	// containerd's older names for the same; it has none for the index of a raw image.
	AnnotationContainerdVerityOffset    = "dev.containerd.erofs.dmverity.offset"
	AnnotationContainerdVerityRoot      = "dev.containerd.erofs.dmverity.root_digest"
	AnnotationContainerdVerityBlockSize = "dev.containerd.erofs.dmverity.block_size"
)

// The annotations of EROFS layers begin with these.
const (
	PrefixErofs           = "org.erofs."
	PrefixContainerdErofs = "dev.containerd.erofs."
)

// Erofs says that the layer is an EROFS image by its media type, raw or in zstd
// frames.
func (l Layer) Erofs() bool {
	kind := layerKindOf(l.MediaType)
	return kind == kindErofs || kind == kindErofsZstd
}

// manifestAccept is the Accept header of a manifest request.
var manifestAccept = strings.Join([]string{
	ocispec.MediaTypeImageIndex, mediaTypeDockerList,
	ocispec.MediaTypeImageManifest, mediaTypeDockerManifest,
}, ", ")

func isIndexType(t string) bool {
	return t == ocispec.MediaTypeImageIndex || t == mediaTypeDockerList
}

func isManifestType(t string) bool {
	return t == ocispec.MediaTypeImageManifest || t == mediaTypeDockerManifest
}

func isImageConfigType(t string) bool {
	return t == ocispec.MediaTypeImageConfig || t == mediaTypeDockerConfig
}

// isTarType says whether a layer is a tar archive that is not compressed.
func isTarType(t string) bool {
	return strings.HasSuffix(t, ".tar")
}

// layerKind is what a layer's media type says of its bytes.
type layerKind int

const (
	kindOther      layerKind = iota // not known: only the bytes can tell
	kindErofs                       // a raw image, mountable by ranges
	kindErofsZstd                   // an image in zstd frames
	kindErofsOther                  // of the EROFS family, but not an image that we know
	kindCompressed                  // a compressed tar: certainly not an image
)

// layerKindOf classifies in the order of preference: the draft's names,
// containerd's, then any type ending in ".erofs".
func layerKindOf(t string) layerKind {
	switch t {
	case MediaTypeErofs, MediaTypeContainerdErofs:
		return kindErofs
	case MediaTypeErofsZstd, mediaTypeContainerdErofsZstd:
		return kindErofsZstd
	}
	switch {
	case strings.HasSuffix(t, ".erofs"):
		return kindErofs
	case strings.HasPrefix(t, MediaTypeErofs+"+"), strings.HasPrefix(t, MediaTypeErofs+"."):
		return kindErofsOther
	case strings.HasSuffix(t, "+gzip"), strings.HasSuffix(t, ".gzip"), strings.HasSuffix(t, "+zstd"), strings.HasSuffix(t, ".zstd"):
		return kindCompressed
	}
	return kindOther
}
