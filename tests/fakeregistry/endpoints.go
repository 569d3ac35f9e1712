package fakeregistry

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const maxManifest = 4 << 20

func (r *Registry) routes() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, req *http.Request) {
		repo, kind, name, ok := splitPath(req.URL.Path)
		switch {
		case req.URL.Path == "/v2/":
			w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
			w.WriteHeader(http.StatusOK)
		case !ok:
			refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "no such endpoint")
		case kind == "manifests":
			r.manifest(w, req, repo, name)
		case kind == "blobs":
			r.blob(w, req, repo, digest.Digest(name))
		case kind == "uploads":
			r.upload(w, req, repo, name)
		case kind == "referrers":
			r.referrers(w, req, repo, digest.Digest(name))
		}
	})
	return mux
}

// splitPath takes /v2/REPOSITORY/manifests/NAME, /v2/REPOSITORY/blobs/DIGEST,
// /v2/REPOSITORY/blobs/uploads/[ID] and /v2/REPOSITORY/referrers/DIGEST apart. Repositories have slashes of their
// own, so it goes from the end.
func splitPath(path string) (repo, kind, name string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "", "", false
	}
	for _, kind := range []string{"manifests", "blobs/uploads", "blobs", "referrers"} {
		i := strings.LastIndex(rest, "/"+kind+"/")
		if i <= 0 {
			continue
		}
		name := rest[i+len(kind)+2:]
		if !strings.Contains(name, "/") {
			return rest[:i], strings.TrimPrefix(kind, "blobs/"), name, true
		}
	}
	return "", "", "", false
}

func (r *Registry) blob(w http.ResponseWriter, req *http.Request, repo string, d digest.Digest) {
	b := r.store.blob(repo, d)
	if b == nil {
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown to registry")
		return
	}
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "only GET and HEAD")
		return
	}
	if r.storage != nil && req.Method == http.MethodGet {
		w.Header().Set("Location", r.storage.sign(req.URL.Path, time.Now()))
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Docker-Content-Digest", d.String())
	http.ServeContent(w, req, "", time.Time{}, io.NewSectionReader(b.data, 0, b.size))
}

func (r *Registry) manifest(w http.ResponseWriter, req *http.Request, repo, name string) {
	switch req.Method {
	case http.MethodPut:
		r.putManifest(w, req, repo, name)
	case http.MethodGet, http.MethodHead:
		m, d, ok := r.store.manifest(repo, name)
		if !ok {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
			return
		}
		w.Header().Set("Content-Type", m.mediaType)
		w.Header().Set("Content-Length", strconv.Itoa(len(m.raw)))
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusOK)
		if req.Method == http.MethodGet {
			_, _ = w.Write(m.raw) // the client's loss
		}
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "only GET, HEAD and PUT")
	}
}

func (r *Registry) putManifest(w http.ResponseWriter, req *http.Request, repo, name string) {
	raw, err := io.ReadAll(io.LimitReader(req.Body, maxManifest+1))
	if err != nil || len(raw) > maxManifest {
		refuse(w, http.StatusBadRequest, "SIZE_INVALID", "manifest cut short or too long")
		return
	}
	d := digest.FromBytes(raw)
	if want, err := digest.Parse(name); err == nil {
		if d = want.Algorithm().FromBytes(raw); d != want {
			refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "provided digest did not match uploaded content")
			return
		}
		name = ""
	}
	r.store.putManifest(repo, name, d, manifest{mediaType: req.Header.Get("Content-Type"), raw: raw})
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Location", fmt.Sprintf("/v2/%s/manifests/%s", repo, d))
	w.WriteHeader(http.StatusCreated)
}

// referrers answers with an index of those whose subject is d.
func (r *Registry) referrers(w http.ResponseWriter, req *http.Request, repo string, d digest.Digest) {
	if !r.opts.Referrers || req.Method != http.MethodGet {
		refuse(w, http.StatusNotFound, "NOT_FOUND", "no such endpoint")
		return
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: r.store.referrers(repo, d)}
	index.SchemaVersion = 2
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	_ = json.NewEncoder(w).Encode(index) // the client's loss
}

// upload serves the monolithic POST, the POST and PUT, and the chunked form.
func (r *Registry) upload(w http.ResponseWriter, req *http.Request, repo, id string) {
	d := digest.Digest(req.URL.Query().Get("digest"))
	if req.Method == http.MethodPost && id == "" {
		r.startUpload(w, req, repo, d)
		return
	}
	u := r.store.upload(id)
	if u == nil || u.repo != repo {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "upload unknown to registry")
		return
	}
	if r.opts.Upload.State && !u.valid(req.URL.RawQuery) && req.Method != http.MethodGet && req.Method != http.MethodDelete {
		refuse(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", "the state is not that of the upload")
		return
	}
	switch req.Method {
	case http.MethodGet:
		if r.opts.Upload.NoStatus {
			refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "no status")
			return
		}
		r.uploadStatus(w, u, http.StatusNoContent)
	case http.MethodPatch:
		r.chunk(w, req, u)
	case http.MethodPut:
		r.finishUpload(w, req, u, d)
	case http.MethodDelete:
		r.store.drop(u)
		w.WriteHeader(http.StatusNoContent)
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "only GET, PATCH, PUT and DELETE")
	}
}

func (r *Registry) chunk(w http.ResponseWriter, req *http.Request, u *upload) {
	if !u.fits(req.Header.Get("Content-Range")) || !u.follows() {
		r.uploadStatus(w, u, http.StatusRequestedRangeNotSatisfiable)
		return
	}
	before := u.size()
	if err := u.take(req.Body); err != nil {
		refuse(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", "body cut short")
		return
	}
	u.chunked(u.size()-before < r.opts.Upload.MinChunk)
	r.uploadStatus(w, u, http.StatusAccepted)
}

func (r *Registry) startUpload(w http.ResponseWriter, req *http.Request, repo string, d digest.Digest) {
	query := req.URL.Query()
	if mount := digest.Digest(query.Get("mount")); r.opts.Upload.Mount && mount != "" {
		if b := r.store.blob(query.Get("from"), mount); b != nil {
			r.store.putBlob(repo, mount, b)
			created(w, repo, mount)
			return
		}
	}
	u, err := r.store.newUpload(repo, rand.Text())
	if err != nil {
		refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	if d == "" {
		if n := r.opts.Upload.MinChunk; n > 0 {
			w.Header().Set("OCI-Chunk-Min-Length", strconv.FormatInt(n, 10))
		}
		r.uploadStatus(w, u, http.StatusAccepted)
		return
	}
	r.finishUpload(w, req, u, d)
}

func (r *Registry) finishUpload(w http.ResponseWriter, req *http.Request, u *upload, d digest.Digest) {
	if err := u.take(req.Body); err != nil {
		refuse(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", "body cut short")
		return
	}
	if err := r.store.finish(u, d); errors.Is(err, errDigest) {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", err.Error())
		return
	} else if err != nil {
		refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	created(w, u.repo, d)
}

func created(w http.ResponseWriter, repo string, d digest.Digest) {
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Location", fmt.Sprintf("/v2/%s/blobs/%s", repo, d))
	w.WriteHeader(http.StatusCreated)
}

func (r *Registry) uploadStatus(w http.ResponseWriter, u *upload, status int) {
	location := fmt.Sprintf("/v2/%s/blobs/uploads/%s", u.repo, u.id)
	if r.opts.Upload.Absolute {
		location = r.URL() + location
	}
	if r.opts.Upload.State {
		location += "?" + u.newState()
	}
	w.Header().Set("Location", location)
	w.Header().Set("Docker-Upload-UUID", u.id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(u.size()-1, 0)))
	w.WriteHeader(status)
}

// refuse writes an error document of the distribution specification.
func refuse(w http.ResponseWriter, status int, code, message string) {
	type oneError struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	doc := struct {
		Errors []oneError `json:"errors"`
	}{[]oneError{{code, message}}}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(doc) // the client's loss
}
