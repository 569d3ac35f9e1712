package fakeregistry

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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
	short  bool   // the last chunk was shorter than allowed, so it must be the last
	state  string // that the next step has to show
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

// newState ends what the state before it was good for. It has characters that a
// query must keep as they are.
func (u *upload) newState() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = "_state=" + rand.Text() + "%3D=&keep=a%2Fb"
	return u.state
}

// valid reports whether a query begins with the state, character by character.
func (u *upload) valid(query string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return query == u.state || strings.HasPrefix(query, u.state+"&")
}

// chunked takes note of a chunk; follows reports whether another may come.
func (u *upload) chunked(short bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.short = short
}

func (u *upload) follows() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return !u.short
}

// take adds what comes of body, also where that breaks off.
func (u *upload) take(body io.Reader) error {
	_, err := io.Copy(u, body)
	return err
}

func (u *upload) Write(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var w io.Writer = u.memory
	if u.file != nil {
		w = u.file
	}
	n, err := w.Write(p)
	u.length += int64(n)
	return n, err
}

// drop forgets an upload. Its file is closed with the store.
func (s *store) drop(u *upload) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.uploads, u.id)
}

// open is the number of unfinished uploads.
func (s *store) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.uploads)
}

// referrers lists the manifests of a repository whose subject is d.
func (s *store) referrers(repo string, d digest.Digest) []ocispec.Descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []ocispec.Descriptor{}
	for key, m := range s.manifests {
		if key.repo != repo {
			continue
		}
		doc, ok := m.read()
		if !ok || doc.Subject == nil || doc.Subject.Digest != d {
			continue
		}
		list = append(list, ocispec.Descriptor{
			MediaType: m.mediaType, Digest: digest.Digest(key.digest), Size: int64(len(m.raw)),
			ArtifactType: doc.ArtifactType, Annotations: doc.Annotations,
		})
	}
	slices.SortFunc(list, func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return list
}

// read is what the manifest says, if it is one: tests push other things, too.
func (m manifest) read() (doc ocispec.Manifest, ok bool) {
	err := json.Unmarshal(m.raw, &doc)
	return doc, err == nil
}
