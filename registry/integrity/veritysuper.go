package integrity

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

const (
	// VeritySuperSize is that of a dm-verity superblock, in bytes, without the zeros
	// that fill its block.
	VeritySuperSize = 512
	// DefaultVerityBlock is the block size, of data and hashes, where none is said.
	DefaultVerityBlock = 4096
	// MaxVeritySalt is the size that a salt may have.
	MaxVeritySalt = 256

	minVerityBlock = 512
	maxVerityBlock = 64 << 10

	verityMagic    = "verity\x00\x00"
	verityVersion  = 1
	verityHashType = 1 // 0 is Chrome OS's, which puts the salt behind the block
)

// A VeritySuper is what a dm-verity superblock says.
type VeritySuper struct {
	UUID          [16]byte
	Algorithm     Algorithm
	DataBlockSize int
	HashBlockSize int
	DataBlocks    uint64
	Salt          []byte
}

// ParseVeritySuper reads the superblock that b begins with.
func ParseVeritySuper(b []byte) (*VeritySuper, error) {
	if len(b) < VeritySuperSize {
		return nil, corruptSuper(int64(len(b)), "it ends within its %d bytes", VeritySuperSize)
	}
	b = b[:VeritySuperSize]
	if string(b[:8]) != verityMagic {
		return nil, corruptSuper(0, "the magic number is %x", b[:8])
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != verityVersion {
		return nil, unsupportedSuper(8, "version %d", v)
	}
	if t := binary.LittleEndian.Uint32(b[12:]); t != verityHashType {
		return nil, unsupportedSuper(12, "hash type %d", t)
	}
	s := &VeritySuper{UUID: [16]byte(b[16:32]), DataBlocks: binary.LittleEndian.Uint64(b[72:])}
	if err := s.parseAlgorithm(b[32:64]); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		off  int64
		into *int
	}{{64, &s.DataBlockSize}, {68, &s.HashBlockSize}} {
		size := binary.LittleEndian.Uint32(b[f.off:])
		if !validBlock(int64(size)) {
			return nil, unsupportedSuper(f.off, "a block size of %d bytes", size)
		}
		*f.into = int(size)
	}
	salt := int(binary.LittleEndian.Uint16(b[80:]))
	if salt > MaxVeritySalt {
		return nil, corruptSuper(80, "a salt of %d bytes", salt)
	}
	if !allZero(b[82:88]) || !allZero(b[88+salt:]) {
		return nil, corruptSuper(82, "bytes without a meaning are not zero")
	}
	s.Salt = bytes.Clone(b[88 : 88+salt])
	return s, nil
}

func (s *VeritySuper) parseAlgorithm(field []byte) error {
	name := bytes.TrimRight(field, "\x00")
	for _, a := range []Algorithm{SHA256, SHA512} {
		if string(name) == a.String() {
			s.Algorithm = a
			return nil
		}
	}
	return unsupportedSuper(32, "algorithm %q", name)
}

// Marshal is the superblock on disk, of VeritySuperSize bytes.
func (s *VeritySuper) Marshal() ([]byte, error) {
	if err := s.Algorithm.check(); err != nil {
		return nil, err
	}
	for _, size := range []int{s.DataBlockSize, s.HashBlockSize} {
		if !validBlock(int64(size)) {
			return nil, badBlock(size)
		}
	}
	if len(s.Salt) > MaxVeritySalt {
		return nil, fmt.Errorf("integrity: a dm-verity salt of %d bytes: at most %d", len(s.Salt), MaxVeritySalt)
	}
	b := make([]byte, VeritySuperSize)
	copy(b, verityMagic)
	binary.LittleEndian.PutUint32(b[8:], verityVersion)
	binary.LittleEndian.PutUint32(b[12:], verityHashType)
	copy(b[16:32], s.UUID[:])
	copy(b[32:64], s.Algorithm.String())
	binary.LittleEndian.PutUint32(b[64:], uint32(s.DataBlockSize))
	binary.LittleEndian.PutUint32(b[68:], uint32(s.HashBlockSize))
	binary.LittleEndian.PutUint64(b[72:], s.DataBlocks)
	binary.LittleEndian.PutUint16(b[80:], uint16(len(s.Salt)))
	copy(b[88:], s.Salt)
	return b, nil
}

func validBlock(size int64) bool {
	return size >= minVerityBlock && size <= maxVerityBlock && size&(size-1) == 0
}

func badBlock(size int) error {
	return fmt.Errorf("integrity: a dm-verity block size of %d bytes: want a power of two in [%d, %d]", size, minVerityBlock, maxVerityBlock)
}

func corruptSuper(off int64, format string, args ...any) error {
	return &FormatError{In: "dm-verity superblock", Off: off, What: fmt.Sprintf(format, args...), Err: ErrCorrupt}
}

func unsupportedSuper(off int64, format string, args ...any) error {
	return &FormatError{In: "dm-verity superblock", Off: off, What: fmt.Sprintf(format, args...), Err: ErrUnsupported}
}
