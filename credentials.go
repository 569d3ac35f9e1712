package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// passwordLimit bounds what is read as a password.
const passwordLimit = 64 << 10

// credentialsOption reads what the flags say stands on standard input: a password,
// or a name and a password. Nothing of the kind is taken as an argument.
func (p *program) credentialsOption(c *cli.Context, s *sourceOptions) (err error) {
	password, creds := c.Bool("password-stdin"), c.Bool("creds-stdin")
	switch {
	case creds && (password || s.client.Username != ""):
		return usagef("--creds-stdin excludes --username and --password-stdin: the line holds both")
	case creds:
		s.creds = true
		s.client.Username, s.client.Password, err = readCredentials(c.Context, p.stdin)
		return err
	case password && s.client.Username == "":
		return usagef("--password-stdin needs --username")
	case s.client.Username != "" && !password:
		return usagef("--username needs --password-stdin (a password on the command line would show in ps)")
	case !password:
		return nil
	}
	s.client.Password, err = readPassword(c.Context, p.stdin)
	return err
}

// stdin is what a child reads that was started with the same arguments.
func (s *sourceOptions) stdin() io.Reader {
	switch {
	case s.client.Password == "":
		return nil
	case s.creds:
		return strings.NewReader(s.client.Username + ":" + s.client.Password)
	}
	return strings.NewReader(s.client.Password)
}

// readCredentials reads one line NAME:PASSWORD; a name has no colon. Errors do not
// quote it.
func readCredentials(ctx context.Context, r io.Reader) (name, password string, err error) {
	line, err := readPassword(ctx, r)
	if err != nil {
		return "", "", err
	}
	name, password, ok := strings.Cut(line, ":")
	if !ok || name == "" || password == "" || strings.ContainsAny(line, "\r\n") {
		return "", "", errors.New("--creds-stdin: standard input is not one line of the form NAME:PASSWORD")
	}
	return name, password, nil
}

// readPassword reads all of r; a signal ends the wait for somebody who types.
func readPassword(ctx context.Context, r io.Reader) (string, error) {
	type answer struct {
		b   []byte
		err error
	}
	read := make(chan answer, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(r, passwordLimit+int64(len("\r\n"))+1))
		read <- answer{b, err}
	}()
	var a answer
	select {
	case a = <-read:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if a.err != nil {
		return "", fmt.Errorf("read the password: %w", a.err)
	}
	password := strings.TrimRight(string(a.b), "\r\n")
	if len(password) > passwordLimit {
		return "", fmt.Errorf("read the password: more than %d bytes on standard input", passwordLimit)
	}
	if password == "" {
		return "", errors.New("read the password: nothing on standard input")
	}
	return password, nil
}
