package registry

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"

	"go.podman.io/image/v5/pkg/docker/config"
	"go.podman.io/image/v5/types"
)

// Environment variables that the package reads, once, in New.
const (
	envUsername = "EROFS_OCI_USERNAME"
	envPassword = "EROFS_OCI_PASSWORD"
	envAuthFile = "REGISTRY_AUTH_FILE"
)

// credentials are what a registry's token service or Basic challenge is
// answered with. The zero value is nobody.
type credentials struct {
	username, password string
	identityToken      string // an OAuth refresh token, in place of a password
	source             string // where they were found, for messages; nobody has none
}

func (c credentials) none() bool {
	return c.username == "" && c.password == "" && c.identityToken == ""
}

// basic is the value of Basic authorization.
func (c credentials) basic() string {
	return base64.StdEncoding.EncodeToString([]byte(c.username + ":" + c.password))
}

// secrets lists what must not be shown.
func (c credentials) secrets() []string {
	if c.none() {
		return nil
	}
	return []string{c.password, c.identityToken, c.basic()}
}

// A keyring looks credentials up: given ones, else the environment's, else those
// in the login files.
type keyring struct {
	given    credentials
	authFile string // "": where docker and podman keep them
}

func newKeyring(o Options) (keyring, error) {
	k := keyring{authFile: o.AuthFile}
	fileFrom := "the auth file"
	if k.authFile == "" {
		k.authFile, fileFrom = os.Getenv(envAuthFile), envAuthFile
	}
	user, password, source := o.Username, o.Password, "the given user name and password"
	if user == "" && password == "" {
		user, password, source = os.Getenv(envUsername), os.Getenv(envPassword), envUsername+" and "+envPassword
	}
	if (user == "") != (password == "") {
		return k, fmt.Errorf("credentials: %s: one of the two is empty; give both or neither", source)
	}
	if user != "" {
		k.given = credentials{username: user, password: password, source: source}
		return k, nil
	}
	// The library takes a missing file for an empty one, which is right for the
	// usual places but not for a file that somebody named.
	if k.authFile != "" {
		if _, err := os.Stat(k.authFile); err != nil {
			return k, fmt.Errorf("credentials: %s: %w", fileFrom, err)
		}
	}
	return k, nil
}

// lookup reads the files anew each time, so that a login which happens while an
// image is mounted counts at the next challenge.
func (k keyring) lookup(ref Reference) (credentials, error) {
	if !k.given.none() {
		return k.given, nil
	}
	found, err := config.GetCredentials(&types.SystemContext{AuthFilePath: k.authFile}, ref.name())
	if err != nil {
		return credentials{}, fmt.Errorf("credentials for %s: %w", ref.Host, errors.New(clean(err.Error(), maxErrorText)))
	}
	c := credentials{username: found.Username, password: found.Password, identityToken: found.IdentityToken}
	switch {
	case c.none():
		return k.fromStore(ref.Host)
	case k.authFile != "":
		c.source = k.authFile
	default:
		c.source = "the docker or podman login"
	}
	return c, nil
}

// fromStore asks the credsStore of the login file.
func (k keyring) fromStore(host string) (credentials, error) {
	path := k.authFile
	if path == "" {
		path = dockerConfig()
	}
	c, err := fromCredsStore(path, host)
	if err != nil {
		return credentials{}, fmt.Errorf("credentials for %s: %w", host, errors.New(clean(err.Error(), maxErrorText)))
	}
	return c, nil
}
