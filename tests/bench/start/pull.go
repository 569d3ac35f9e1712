package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// unpackWithUmoci is how an image is pulled and unpacked without a daemon.
func (b *bench) unpackWithUmoci(ctx context.Context, dir string) (root string, err error) {
	layout, bundle := filepath.Join(dir, "layout"), filepath.Join(dir, "bundle")
	for _, argv := range [][]string{
		{"skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "docker://" + b.site.Ref(tarTag), "oci:" + layout + ":v1"},
		{"umoci", "unpack", "--image", layout + ":v1", bundle},
	} {
		if err := b.site.Command(exec.CommandContext(ctx, argv[0], argv[1:]...)); err != nil {
			return "", err
		}
	}
	return filepath.Join(bundle, "rootfs"), nil
}

// unpackWithTar is as fast as it gets: the layer goes to tar as it comes, and nobody
// verifies it.
func (b *bench) unpackWithTar(ctx context.Context, dir string) (root string, err error) {
	layer, err := b.layer(ctx)
	if err != nil {
		return "", err
	}
	root = filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return "", err
	}
	body, err := b.get(ctx, "blobs/"+layer)
	if err != nil {
		return "", err
	}
	defer body.Close()
	tar := exec.CommandContext(ctx, "tar", "-C", root, "--numeric-owner", "-xpzf", "-")
	tar.Stdin = body
	return root, b.site.Command(tar)
}

// layer is the digest of the one layer of the ordinary image.
func (b *bench) layer(ctx context.Context) (string, error) {
	body, err := b.get(ctx, "manifests/"+tarTag)
	if err != nil {
		return "", err
	}
	defer body.Close()
	var m ocispec.Manifest
	if err := json.NewDecoder(body).Decode(&m); err != nil {
		return "", fmt.Errorf("manifest of the ordinary image: %w", err)
	}
	if len(m.Layers) != 1 {
		return "", fmt.Errorf("the ordinary image has %d layers, want 1", len(m.Layers))
	}
	return m.Layers[0].Digest.String(), nil
}

// get asks for something of the images' repository.
func (b *bench) get(ctx context.Context, what string) (io.ReadCloser, error) {
	repository, _, _ := strings.Cut(strings.TrimPrefix(b.site.Ref(tarTag), b.site.Addr()+"/"), ":")
	url := b.site.URL() + path.Join("/v2", repository, what)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("GET %s: %s", url, resp.Status), resp.Body.Close())
	}
	return resp.Body, nil
}
