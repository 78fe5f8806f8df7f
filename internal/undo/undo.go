// Package undo collects the steps that take back what a function has acquired,
// so that every error path runs all of them and the good path none.
package undo

import (
	"errors"
	"slices"
)

// Stack is a list of clean-up steps, run last in, first out. The zero Stack is
// ready. It is not safe for concurrent use.
//
//	var u undo.Stack
//	defer func() { err = u.Run(err) }() // runs only when err != nil
//	f, err := os.Open(...)
//	u.Add(f.Close)
type Stack struct {
	steps []func() error
}

// Add pushes a step. Its error, if any, is joined to the one given to Run.
func (s *Stack) Add(step func() error) { s.steps = append(s.steps, step) }

// Run runs and forgets all steps when err is not nil, and returns err joined
// with what the steps returned. When err is nil it runs nothing.
func (s *Stack) Run(err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(err, s.Close())
}

// Close runs and forgets all steps, for what holds things until it is closed.
func (s *Stack) Close() error {
	var err error
	for _, step := range slices.Backward(s.steps) {
		err = errors.Join(err, step())
	}
	s.steps = nil
	return err
}

// Release forgets all steps: what was acquired now belongs to someone else.
func (s *Stack) Release() { s.steps = nil }
