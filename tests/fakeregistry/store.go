package fakeregistry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
)

var errDigest = errors.New("provided digest did not match uploaded content")

// A store holds blobs, manifests and unfinished uploads.
type store struct {
	dir string

	mu        sync.Mutex
	blobs     map[blobKey]*blob
	manifests map[manifestKey]manifest
	tags      map[tagKey]digest.Digest
	uploads   map[string]*upload
	files     []*os.File // to be closed in the end
}

type (
	blobKey     struct{ repo, digest string }
	manifestKey struct{ repo, digest string }
	tagKey      struct{ repo, tag string }
)

type blob struct {
	data io.ReaderAt
	size int64
}

type manifest struct {
	mediaType string
	raw       []byte
}

func newStore(dir string) *store {
	return &store{
		dir:   dir,
		blobs: map[blobKey]*blob{}, manifests: map[manifestKey]manifest{},
		tags: map[tagKey]digest.Digest{}, uploads: map[string]*upload{},
	}
}

func (s *store) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for _, f := range s.files {
		err = errors.Join(err, f.Close())
	}
	s.files = nil
	clear(s.blobs)
	clear(s.uploads)
	return err
}

func (s *store) blob(repo string, d digest.Digest) *blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[blobKey{repo, d.String()}]
}

func (s *store) putBlob(repo string, d digest.Digest, b *blob) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[blobKey{repo, d.String()}] = b
}

// manifest finds by tag or by digest.
func (s *store) manifest(repo, name string) (manifest, digest.Digest, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := digest.Digest(name)
	if tagged, ok := s.tags[tagKey{repo, name}]; ok {
		d = tagged
	}
	m, ok := s.manifests[manifestKey{repo, d.String()}]
	return m, d, ok
}

func (s *store) putManifest(repo, tag string, d digest.Digest, m manifest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.manifests[manifestKey{repo, d.String()}] = m
	if tag != "" {
		s.tags[tagKey{repo, tag}] = d
	}
}

// An upload grows until it is finished. One client at a time sends to it.
type upload struct {
	repo, id string
	file     *os.File      // with a directory
	memory   *bytes.Buffer // without

	mu     sync.Mutex
	length int64
}

func (s *store) newUpload(repo, id string) (*upload, error) {
	u := &upload{repo: repo, id: id}
	if s.dir == "" {
		u.memory = new(bytes.Buffer)
	} else {
		f, err := os.CreateTemp(s.dir, "blob-*")
		if err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		u.file = f
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if u.file != nil {
		s.files = append(s.files, u.file)
	}
	s.uploads[id] = u
	return u, nil
}

func (s *store) upload(id string) *upload {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.uploads[id]
}

// finish turns an upload into a blob, if its digest is d.
func (s *store) finish(u *upload, d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%w: %w", errDigest, err)
	}
	b := &blob{size: u.size()}
	if u.file != nil {
		b.data = u.file
	} else {
		b.data = bytes.NewReader(u.memory.Bytes())
	}
	got, err := d.Algorithm().FromReader(io.NewSectionReader(b.data, 0, b.size))
	if err != nil {
		return err
	}
	if got != d {
		return errDigest
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.uploads, u.id)
	s.blobs[blobKey{u.repo, d.String()}] = b
	return nil
}

func (u *upload) size() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.length
}

// fits reports whether a chunk with this Content-Range ("first-last", or none)
// is the next one.
func (u *upload) fits(contentRange string) bool {
	return contentRange == "" || strings.HasPrefix(contentRange, fmt.Sprintf("%d-", u.size()))
}

func (u *upload) take(body io.Reader) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	var w io.Writer = u.memory
	if u.file != nil {
		w = u.file
	}
	n, err := io.Copy(w, body)
	u.length += n
	return err
}
