package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/docker-credential-helpers/client"
	helpers "github.com/docker/docker-credential-helpers/credentials"
)

const (
	// dockerLoginKey is what docker login calls the registry of Docker.
	dockerLoginKey = "https://index.docker.io/v1/"
	// tokenUser in place of a user name says that the secret is an identity token.
	tokenUser = "<token>"
	// maxLoginFile bounds a login file; real ones are a few KiB.
	maxLoginFile = 4 << 20
)

// fromCredsStore asks the program that the login file in path names as its
// credsStore: Docker's way to keep all logins out of the file, which the image
// library does not know. No file, no such line, and a store that does not know
// the host are nobody.
func fromCredsStore(path, host string) (credentials, error) {
	store, err := credsStore(path)
	if err != nil || store == "" {
		return credentials{}, err
	}
	key := host
	if host == dockerHost {
		key = dockerLoginKey
	}
	name := "docker-credential-" + store
	found, err := client.Get(client.NewShellProgramFunc(name), key)
	switch {
	case helpers.IsErrCredentialsNotFound(err):
		return credentials{}, nil
	case err != nil:
		return credentials{}, fmt.Errorf("%s, the credsStore of %s: %w", name, path, err)
	case found.Username == tokenUser:
		return credentials{identityToken: found.Secret, source: name}, nil
	}
	return credentials{username: found.Username, password: found.Secret, source: name}, nil
}

func credsStore(path string) (string, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	var file struct {
		CredsStore string `json:"credsStore"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxLoginFile)).Decode(&file); err != nil {
		return "", fmt.Errorf("%s: not a login file in JSON", path) // the parser's error may quote it
	}
	if strings.ContainsAny(file.CredsStore, "/\\") {
		return "", fmt.Errorf("%s: credsStore %q is a path; want the NAME of docker-credential-NAME", path, clean(file.CredsStore, 100))
	}
	return file.CredsStore, nil
}

// dockerConfig is where docker login keeps its file.
func dockerConfig() string {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		dir = filepath.Join(os.Getenv("HOME"), ".docker")
	}
	return filepath.Join(dir, "config.json")
}
